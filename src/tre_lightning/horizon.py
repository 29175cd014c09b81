"""How long a run is."""

import math

from lightning.pytorch import Trainer


def total_batches(trainer: Trainer) -> float:
    """Training batches of the whole run; infinite where the trainer has no end."""
    epochs = trainer.max_epochs
    return math.inf if epochs is None or epochs < 0 else epochs * trainer.num_training_batches
