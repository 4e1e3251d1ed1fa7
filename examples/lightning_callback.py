"""Lightning: one callback. `import pytorch_lightning as L` does as well."""

import lightning as L
import torch
from _small import loader, show, small_model
from torch import Tensor

from repflow.callbacks import RepresentationMonitor
from repflow.monitor.sinks import RunFileSink


class LanguageModel(L.LightningModule):
    """Trains the small model to predict the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def training_step(self, tokens: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


run_file = RunFileSink()  # what sinks=None makes, too; named here to tell its path
trainer = L.Trainer(
    max_epochs=1,
    accelerator="cpu",
    accumulate_grad_batches=2,
    logger=False,
    enable_checkpointing=False,
    callbacks=[RepresentationMonitor(every_n_steps=5, name="lightning_callback", sinks=run_file)],
)
trainer.fit(LanguageModel(), loader(32))

print(f"for EarlyStopping and ModelCheckpoint: V_loc {trainer.callback_metrics['repflow/v_loc']:.2e}")
show(run_file.path)
