"""The demo's training: next-byte prediction as a `LightningModule`."""

import math
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy


class ByteLanguageModel(L.LightningModule):
    """Trains a causal language model to predict the next byte; losses are in nats per byte.

    AdamW, its learning rate rising over a tenth of `steps` and falling along a cosine to a tenth of its peak.

    Args:
        model: takes `input_ids=[B, T]` and returns an object with `logits [B, T, 256]`.
        learning_rate: the peak.
        steps: length of the schedule, in optimizer steps.
    """

    def __init__(self, model: Module, *, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.model = model
        self._learning_rate = learning_rate
        self._steps = steps

    def forward(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the byte after each one."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def training_step(self, windows: Int64[Tensor, "B W"]) -> Tensor:
        """Mean loss of a batch of windows of `W = T + 1` bytes."""
        loss = self._loss(windows)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, windows: Int64[Tensor, "B W"]) -> None:
        """Logs the mean loss over the validation windows as `val_loss`."""
        self.log("val_loss", self._loss(windows), batch_size=len(windows))

    def configure_optimizers(self) -> Any:
        """AdamW, scheduled by step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        warmup = max(1, self._steps // 10)
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / self._steps, 1)))
        return min((step + 1) / warmup, 1) * (0.1 + 0.9 * cosine)

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self(windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
