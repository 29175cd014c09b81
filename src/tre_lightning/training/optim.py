"""The length of a run, and the optimiser of supervised training."""

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn


def decaying_adamw(
    model: nn.Module,
    trainer: Trainer,
    lr: float,
    final_lr_fraction: float,
    warmup_fraction: float = 0.0,
) -> OptimizerLRSchedulerConfig:
    """AdamW whose rate decays linearly from ``lr`` to ``final_lr_fraction`` of it at the end.

    It rises linearly to ``lr`` over the first ``warmup_fraction`` of the steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    steps = trainer.estimated_stepping_batches if has_end(trainer) else math.inf
    warmup = round(warmup_fraction * steps) if warmup_fraction > 0.0 else 0
    left = max(steps - warmup - 1, 1)

    def fraction(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1.0 - (1.0 - final_lr_fraction) * min((step - warmup) / left, 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, fraction)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_decay(trainer: Trainer, final_lr_fraction: float, warmup_fraction: float = 0.0) -> None:
    """Raise ValueError for a decay or a fraction of warm-up in a run without a known end."""
    if has_end(trainer):
        return
    if warmup_fraction > 0.0:
        raise ValueError(
            f"model.warmup_fraction={warmup_fraction} needs a run with an end; give "
            "trainer.max_epochs or trainer.max_steps, or 0 for no warm-up"
        )
    if final_lr_fraction != 1.0:
        raise ValueError(
            f"model.final_lr_fraction={final_lr_fraction} needs a run with an end; give "
            "trainer.max_epochs or trainer.max_steps, or 1 for a constant rate"
        )


def total_batches(trainer: Trainer) -> float:
    """Training batches of the whole run, known in ``fit``; infinite without a limit."""
    batches = trainer.num_training_batches
    by_epochs = trainer.max_epochs * batches if _limited(trainer.max_epochs) else math.inf  # type: ignore[operator]
    if not _limited(trainer.max_steps):
        return by_epochs
    return min(by_epochs, _batches_of(trainer.max_steps, trainer))


def has_end(trainer: Trainer) -> bool:
    """Whether :func:`total_batches` will be finite; known before ``fit``."""
    if trainer.max_epochs is None and not _limited(trainer.max_steps):
        # Lightning then makes it 1000 epochs.
        return not any(isinstance(c, Timer) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return _limited(trainer.max_epochs) or _limited(trainer.max_steps)


def seconds_left(trainer: Trainer) -> float:
    """Seconds until the time limit of the run; infinite without one."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    left = [t for timer in timers if (t := timer.time_remaining()) is not None]
    return max(min(left, default=math.inf), 0.0)


def _limited(count: int | None) -> bool:
    return count is not None and count >= 0


def _batches_of(steps: int, trainer: Trainer) -> float:
    """Batches until so many optimiser steps are done."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return math.ceil(steps / module.steps_a_batch)  # type: ignore[operator]
    together, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if math.isinf(batches):
        return steps * together
    # An epoch's last step may have fewer batches.
    epochs, rest = divmod(steps, math.ceil(batches / together)) if batches else (0, 0)
    return epochs * batches + min(rest * together, batches)
