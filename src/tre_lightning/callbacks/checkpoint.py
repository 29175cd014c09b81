"""Checkpoints by PPO iteration: the last, the one before it and the best."""

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities import apply_to_collection

from tre_lightning.common.distributed import agreed, world
from tre_lightning.common.errors import CheckpointError
from tre_lightning.common.validation import at_least

FOLDER = "checkpoints"
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_LARGE = 256 * 2**20  # bytes; a larger checkpoint is not written after every iteration
_OF_THE_RUN = ("iterations_an_epoch", "prompts", "slurm_job")


class IterationCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` now and then, and ``best.ckpt`` after a better validation.

    Lightning's own ModelCheckpoint counts optimiser steps, of which an iteration has many. Only
    whole iterations are saved, so an error inside an update loses no more than what was done since
    the last save; a checkpoint is written beside its target and then renamed, so a kill never
    leaves half a file. Unless checkpoints are large, the ``last.ckpt`` before it stays as
    ``previous.ckpt``. What has several names is one file, where the file system knows hard links.

    The last iteration of an epoch is saved when the epoch's validation begins, in the state in
    which Lightning repeats the whole validation on resume, and again after it.
    """

    def __init__(
        self,
        every_n_iterations: int | None = None,
        every_n_minutes: float = 5.0,
        monitor: str = "val/pass@1",
        keep_all: bool = False,
    ) -> None:
        """Keep the options.

        Args:
            every_n_iterations: PPO iterations between two checkpoints; the end of an epoch is
                always saved. none = 1 where a checkpoint takes less than 256 MiB, else by
                every_n_minutes.
            every_n_minutes: of a large model, an iteration is saved if the next one would end so
                long after the last save; a better validation and the end of the run are saved too.
            monitor: metric of which ``best.ckpt`` holds the highest value.
            keep_all: also keep ``iteration=N.ckpt`` of every save.
        """
        if every_n_iterations is not None:
            at_least("checkpoint.every_n_iterations", every_n_iterations, 1)
        at_least("checkpoint.every_n_minutes", every_n_minutes, 0)
        self.every_n_iterations = every_n_iterations
        self.every_n_minutes = every_n_minutes
        self.monitor = monitor
        self.keep_all = keep_all
        self.best_score = -math.inf
        self.saved = 0  # the last iteration that was saved
        self._wrote_last = False
        self._large = False
        self._saved_at = self._ended_at = 0.0  # clock after the last save, and the last iteration
        self._improved = False  # a best that is not saved yet

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See how large a checkpoint is; start the clock."""
        self._large = _checkpoint_bytes(pl_module) >= _LARGE
        self.saved = cast(int, pl_module.iteration)  # a resumed run comes from there
        self._saved_at = self._ended_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the iteration that has just ended, unless the epoch ends with it."""
        if not trainer.is_last_batch and self._is_due(trainer, pl_module):
            self._save_last(trainer, pl_module)
        self._ended_at = time.monotonic()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the last iteration of the epoch before its validation."""
        if not self._fits(trainer) or (batch_idx, dataloader_idx) != (0, 0):
            return
        if _stops_within_epoch(trainer):
            return  # saved already, and a resumed run has no validation here
        if not self._is_due(trainer, pl_module, epoch_ends=True):
            return
        # Lightning repeats a validation that looks cut off: one step started, none finished.
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        counts = [cast(Any, progress.total), cast(Any, progress.current)]
        for count in counts:
            count.ready = count.started = count.completed + 1
        self._save_last(trainer, pl_module)
        for count in counts:
            count.started = count.completed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last iteration of the epoch, unless the epoch was cut short and will go on."""
        if _stops_within_epoch(trainer):
            return
        if self._improved or self._is_due(trainer, pl_module, epoch_ends=True):
            self._save_last(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best so far, with the epoch that ends with this validation."""
        if not self._fits(trainer):
            return
        self.check_monitor(trainer)
        score = float(trainer.callback_metrics[self.monitor])
        if score > self.best_score:
            self.best_score = score
            self._improved = True
            if _stops_within_epoch(trainer):  # the iteration was saved when it ended
                self._save(trainer, [BEST])
                self._improved = False

    def check_monitor(self, trainer: Trainer) -> None:
        """Refuse a ``monitor`` that the last validation did not log."""
        logged = [tag for tag in trainer.callback_metrics if tag.startswith(("val/", "val_"))]
        if logged and self.monitor not in logged:
            raise MisconfigurationException(
                f"checkpoint.monitor={self.monitor} is not logged; use one of {', '.join(logged)}"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Turn NumPy numbers in the states of callbacks into plain ones."""
        checkpoint["callbacks"] = _plain(checkpoint["callbacks"])

    def state_dict(self) -> dict[str, Any]:
        """State to save: the best score so far."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far."""
        self.best_score = state_dict["best_score"]

    @staticmethod
    def _fits(trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _is_due(
        self, trainer: Trainer, pl_module: LightningModule, *, epoch_ends: bool = False
    ) -> bool:
        """Whether the last iteration is to be saved; all ranks say the same."""
        if _run_ends(trainer, epoch_ends=epoch_ends):
            return True
        every = self.every_n_iterations or (None if self._large else 1)
        if every is not None:
            return epoch_ends or cast(int, pl_module.iteration) % every == 0
        now = time.monotonic()
        until_next = (now - self._saved_at) + (now - self._ended_at)
        due = trainer.strategy.broadcast(until_next >= 60.0 * self.every_n_minutes)
        return bool(due)

    def _save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [LAST]
        if self.keep_all:
            names.append(f"iteration={pl_module.iteration}.ckpt")
        if self._improved:
            names.append(BEST)
        self._save(trainer, names)
        self.saved = cast(int, pl_module.iteration)
        self._saved_at = time.monotonic()
        self._improved = False

    def _save(self, trainer: Trainer, names: Sequence[str]) -> None:
        """Write the state of the run once, under the first name, and give it the others."""
        target = folder(trainer.default_root_dir) / names[0]
        partial = target.with_suffix(".partial")
        with agreed(), _as_checkpoint_error(target, partial):
            try:
                trainer.save_checkpoint(partial, weights_only=False)
            except Exception:
                if world()[1] > 1:
                    trainer.strategy.barrier()  # at the end of save_checkpoint, others wait in one
                raise
            if trainer.is_global_zero:
                self._read_back(trainer, partial)
                for name in names[1:]:
                    _also_named(partial, target.with_name(name))
                if names[0] == LAST and not self._large:
                    self._keep_previous(target)
                partial.replace(target)

    def _read_back(self, trainer: Trainer, file: Path) -> None:
        """Raise CheckpointError if what was written cannot be loaded; tensors stay unread."""
        if (reason := damage(file)) is None:
            return
        file.unlink()
        with _as_run_error():
            check_states(trainer.callbacks)  # type: ignore[attr-defined]
        raise CheckpointError(f"the checkpoint could not be read back: {reason}")

    def _keep_previous(self, last: Path) -> None:
        """Keep ``last.ckpt`` as ``previous.ckpt``, unless it is damaged."""
        good = self._wrote_last or damage(last) is None
        self._wrote_last = True
        if good and last.exists():
            _also_named(last, last.with_name(PREVIOUS))


def _also_named(file: Path, name: Path) -> None:
    """Let a file have another name; a copy where the file system has no hard links."""
    partial = name.with_name(f"{name.stem}.link.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(file, partial)
    except OSError:
        shutil.copyfile(file, partial)
    partial.replace(name)


def _run_ends(trainer: Trainer, *, epoch_ends: bool) -> bool:
    """Whether nothing is trained after this iteration, as far as it is known by now."""
    epochs = trainer.fit_loop.epoch_progress.current.ready
    last = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs
    steps = 0 <= trainer.max_steps <= trainer.global_step
    return trainer.received_sigterm or trainer.should_stop or steps or (epoch_ends and last)


def _checkpoint_bytes(module: LightningModule) -> int:
    """About how large a checkpoint is: the weights, and two moments of what is trained."""
    return sum(
        parameter.numel() * parameter.element_size() * (3 if parameter.requires_grad else 1)
        for parameter in module.parameters()
    )


def _stops_within_epoch(trainer: Trainer) -> bool:
    """Whether something (a Timer, early stopping) ends the run before its epoch's last batch.

    Lightning counts such an epoch as a whole one, but only after the batch, when it is saved.
    """
    return trainer.should_stop and not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def check_states(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks whose state could be saved in a checkpoint but not loaded from it.

    Raises:
        ValueError: naming the callback.
    """
    for callback in callbacks:
        try:
            state = _plain(callback.state_dict())
        except Exception:  # it may need a run that has begun
            continue
        if reason := _unreadable(
            apply_to_collection(state, torch.Tensor, lambda t: t.new_empty(0))
        ):
            raise ValueError(
                f"the state_dict() of the callback {callback.state_key} cannot be read back from a "
                f"checkpoint ({reason}); let it hold tensors, numbers, texts, lists and dicts"
            )


def _plain(state: Any) -> Any:
    """The state with NumPy numbers as plain ones, as a checkpoint cannot load the former."""
    return apply_to_collection(state, np.generic, lambda number: number.item())


def _unreadable(state: Any) -> str | None:
    """Why a state cannot be read back after it was saved; None = it can be."""
    file = BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"Unsupported (global|class|operand)[^.]*\S", str(error), re.IGNORECASE)
        return f"{type(error).__name__}: {found[0] if found else str(error)[:100]}"
    return None


@contextmanager
def _as_run_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{error}; what was saved before is intact") from error


@contextmanager
def _as_checkpoint_error(target: Path, partial: Path) -> Iterator[None]:
    """Name what could not be written, and leave no half-written file."""
    try:
        yield
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{target} could not be written ({error}); what was saved before is intact; make "
            "room on the disk"
        ) from error


def folder(run_dir: str | Path) -> Path:
    """The folder of the checkpoints of a run directory."""
    return Path(run_dir) / FOLDER


def find_checkpoint(ckpt_path: str, run_dir: str | Path) -> Path:
    """The file that ``ckpt_path`` (a path, ``last`` or ``best``) refers to.

    Instead of a damaged ``last``, with a warning, the one before it.

    Raises:
        ValueError: if it does not exist, or both are damaged.
    """
    named = ckpt_path in ("last", "best")
    path = folder(run_dir) / f"{ckpt_path}.ckpt" if named else Path(ckpt_path)
    previous = folder(run_dir) / PREVIOUS
    if ckpt_path == "last" and previous.exists() and damage(path):
        if damage(previous):
            raise ValueError(
                f"ckpt_path=last: neither {path} nor {previous.name} beside it can be read; give "
                "best or another checkpoint file, or start the run again in another directory"
            )
        iteration = saved_run(previous)["iteration"]
        warn(f"{path} is damaged or missing; going on with {previous} (iteration {iteration})")
        return previous
    if not path.exists():
        raise ValueError(
            f"ckpt_path={ckpt_path} does not exist ({path}); give a checkpoint file, or last or "
            "best with the run's trainer.default_root_dir"
        )
    return path


@rank_zero_only
def warn(message: str) -> None:
    """Print a warning to stderr, on the first rank only."""
    print(f"warning: {message}", file=sys.stderr)


def has_run(run_dir: str | Path) -> bool:
    """Whether there is a checkpoint that ``last`` could refer to."""
    return any((folder(run_dir) / name).exists() for name in (LAST, PREVIOUS))


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be read, judged without loading its tensors.

    A file that was cut off has lost its directory, which stands at its end.
    """
    try:
        saved_run(path)
    except ValueError as error:
        return str(error)
    return None


def saved_run(path: Path) -> dict[str, Any]:
    """Iteration, parameter shapes and seed that a checkpoint of a PPO run holds.

    Returns:
        The finished ``iteration``, the optimiser's ``global_step``, the model's ``shapes``, the
        ``seed``, and what :meth:`tre_lightning.training.ppo.PPOModule.on_save_checkpoint` says of
        the run.

    Raises:
        ValueError: if the file is no checkpoint of a PPO run.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
        state = checkpoint["tre_lightning"]
        found = {key: state[key] for key in ("iteration", "shapes")}
        found |= {key: state.get(key) for key in _OF_THE_RUN}  # older ones know less
        return {
            **found,
            "global_step": checkpoint["global_step"],
            "seed": checkpoint.get("hyper_parameters", {}).get("seed"),
        }
    except Exception as error:
        raise ValueError(
            f"ckpt_path={path} is not a checkpoint that fit wrote ({type(error).__name__}); give "
            "another"
        ) from error
