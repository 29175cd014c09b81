"""How long a run is, in training batches; for PPO a batch is an iteration.

The one notion of it, for learning rates, progress and checks: whichever comes first of
``trainer.max_epochs`` and ``trainer.max_steps``, with ``trainer.limit_train_batches``. Steps are
the optimiser's, as Lightning counts them: a PPO iteration has ``num_epochs * num_minibatches`` of
them, and a run ends with the iteration that reaches ``max_steps`` (updates that are skipped are no
steps). What ends a run by the clock (``trainer.max_time``, a ``Timer``) may end it earlier.
"""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


def total_batches(trainer: Trainer) -> float:
    """Training batches of the whole run, in ``fit``; infinite where neither of the two is given."""
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
    """Until the clock ends the run; infinite where it does not."""
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
