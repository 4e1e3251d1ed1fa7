"""Fine-tune a pretrained causal language model from a local folder, with low-rank adapters or in full.

python finetune.py FOLDER [--full]

FOLDER holds a model and its tokenizer as `save_pretrained` writes them. Without it, a tiny one
with random weights is made.
"""

import argparse
import itertools
from pathlib import Path

from _small import save_small_checkpoint, show, text
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor.sinks import RunFileSink

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint; a tiny one is made if none is given")
parser.add_argument("--full", action="store_true", help="train all weights instead of adapters")
options = parser.parse_args()
if options.folder is None:
    print("no folder was given: fine-tuning a tiny model with random weights, made in tiny-checkpoint/")
    options.folder = save_small_checkpoint(Path("tiny-checkpoint"))

tokenizer = AutoTokenizer.from_pretrained(options.folder, local_files_only=True)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
model = AutoModelForCausalLM.from_pretrained(options.folder, local_files_only=True)
if not options.full:
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    model.print_trainable_parameters()

# Paragraphs of different lengths: what the collator pads with is not measured.
paragraphs = [part.strip() for file in itertools.islice(text(), 12) for part in file.split("\n\n") if part.strip()]
encoded = tokenizer(paragraphs[:208], truncation=True, max_length=128)
run_file = RunFileSink()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="finetuned",
        use_cpu=True,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
    ),
    train_dataset=[{"input_ids": ids} for ids in encoded["input_ids"]],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[RepresentationMonitorCallback(every_n_steps=5, name="finetune", sinks=run_file)],
)
trainer.train()
trainer.save_model()

show(run_file.path)
