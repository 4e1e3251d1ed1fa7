"""The Hugging Face Trainer: one callback. The W&B run or TensorBoard that it reports to shows the scalars, too."""

from _small import ROWS, sequences, show, small_model
from transformers import Trainer, TrainingArguments

from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor.sinks import RunFileSink

run_file = RunFileSink()  # what sinks=None makes, too; named here to tell its path
trainer = Trainer(
    model=small_model(),
    args=TrainingArguments(
        output_dir="hf_trainer",
        use_cpu=True,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=3e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="tensorboard",
    ),
    train_dataset=[{"input_ids": tokens, "labels": tokens} for tokens in sequences(32 * ROWS)],
    callbacks=[RepresentationMonitorCallback(every_n_steps=5, name="hf_trainer", sinks=run_file)],
)
trainer.train()

show(run_file.path)
