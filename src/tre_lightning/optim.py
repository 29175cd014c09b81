"""The optimiser of supervised training."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn


def decaying_adamw(
    model: nn.Module, trainer: Trainer, lr: float, final_lr_share: float
) -> OptimizerLRSchedulerConfig:
    """AdamW; its rate falls linearly from ``lr`` to ``final_lr_share`` of it at the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    total = max(int(trainer.estimated_stepping_batches) - 1, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 - (1.0 - final_lr_share) * min(step / total, 1.0)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
