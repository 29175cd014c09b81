"""The optimiser of supervised training."""

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from tre_lightning.horizon import has_end


def decaying_adamw(
    model: nn.Module, trainer: Trainer, lr: float, final_lr_share: float
) -> OptimizerLRSchedulerConfig:
    """AdamW; its rate falls linearly from ``lr`` to ``final_lr_share`` of it at the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    last = max(trainer.estimated_stepping_batches - 1, 1) if has_end(trainer) else math.inf
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 - (1.0 - final_lr_share) * min(step / last, 1.0)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_decay(trainer: Trainer, final_lr_share: float) -> None:
    """Raise ValueError where the rate is to fall until an end that is not known."""
    if final_lr_share != 1.0 and not has_end(trainer):
        raise ValueError(
            f"model.final_lr_share={final_lr_share} needs a run with an end; give "
            "trainer.max_epochs or trainer.max_steps, or 1 for a constant rate"
        )
