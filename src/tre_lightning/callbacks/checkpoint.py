"""Checkpoints by PPO iteration: the last and the best."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

FOLDER = "checkpoints"


class IterationCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` every few iterations and ``best.ckpt`` after a better validation.

    Lightning's own ModelCheckpoint counts optimiser steps, of which an iteration has many. Only
    whole iterations are saved, so an error inside an update loses that iteration and no more; a
    checkpoint is written beside its target and then renamed, so a kill never leaves half a file.
    """

    def __init__(
        self, every_n_iterations: int = 1, monitor: str = "val/pass@1", keep_all: bool = False
    ) -> None:
        """Keep the options.

        Args:
            every_n_iterations: PPO iterations between two checkpoints; the end of an epoch is
                always saved.
            monitor: metric of which ``best.ckpt`` holds the highest value.
            keep_all: keep ``iteration=N.ckpt`` of every save too.
        """
        if every_n_iterations < 1:
            raise ValueError(
                f"checkpoint.every_n_iterations={every_n_iterations} must be at least 1"
            )
        self.every_n_iterations = every_n_iterations
        self.monitor = monitor
        self.keep_all = keep_all
        self.best_score = -math.inf

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the iteration that has just ended."""
        iteration = int(pl_module.iteration)
        due = iteration % self.every_n_iterations == 0 or trainer.is_last_batch
        if due or trainer.received_sigterm:
            self._save(trainer, "last.ckpt")
            if self.keep_all:
                self._save(trainer, f"iteration={iteration}.ckpt")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best so far."""
        score = trainer.callback_metrics.get(self.monitor)
        if not trainer.state.fn == "fit" or trainer.sanity_checking or score is None:
            return
        if float(score) > self.best_score:
            self.best_score = float(score)
            self._save(trainer, "best.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score so far."""
        self.best_score = state_dict["best_score"]

    def _save(self, trainer: Trainer, name: str) -> None:
        target = folder(trainer.default_root_dir) / name
        partial = target.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(target)


def folder(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run directory lie."""
    return Path(run_dir) / FOLDER


def find_checkpoint(ckpt_path: str, run_dir: str | Path) -> Path:
    """The file that ``ckpt_path`` (a path, ``last`` or ``best``) means.

    Raises:
        ValueError: if it does not exist.
    """
    named = ckpt_path in ("last", "best")
    path = folder(run_dir) / f"{ckpt_path}.ckpt" if named else Path(ckpt_path)
    if not path.exists():
        raise ValueError(
            f"ckpt_path={ckpt_path} does not exist ({path}); give a checkpoint file, or last or "
            "best with the run's trainer.default_root_dir"
        )
    return path


def saved_iteration(path: Path) -> int:
    """The PPO iteration that a checkpoint continues with.

    Raises:
        ValueError: if the file is no checkpoint of a PPO run.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
        return int(checkpoint["tre_lightning"]["iteration"])
    except Exception as error:
        raise ValueError(
            f"ckpt_path={path} is not a checkpoint that fit wrote ({type(error).__name__}); give another"
        ) from error

