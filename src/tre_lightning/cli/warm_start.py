"""A supervised warm start (SFT), trained once and cached for runs with the same settings."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tre_lightning.common.validation import at_least, positive, unit_fraction

# Options of the task that say nothing about its demonstrations.
_IRRELEVANT = (
    "tokenizer",
    "batch_size",
    "iterations_per_epoch",
    "eval_batch_size",
    "max_prompt_length",
    "val_size",
    "test_size",
    "long_prompts",
    "reward",
    "timeout",
    "workers",
    "strict",
)
_LR_FROM_SCRATCH, _LR_PRETRAINED = 4e-3, 2e-5
_WAIT_SECONDS = 3600.0


@dataclass(frozen=True)
class WarmStart:
    """Supervised fine-tuning (SFT) on the task's demonstrations before reinforcement learning.

    Args:
        steps: optimiser steps.
        batch_size: demonstrations a step.
        lr: learning rate at the start; none = 4e-3 for a model from scratch, and 2e-5 for a
            pretrained one, which a large rate would make forget what it knows.
        final_lr_fraction: rate at the last step as a fraction of lr; linear decay in between.
        misleading_fraction: fraction of the demonstrations whose steps end elsewhere than the
            target, in [0, 1]; they teach the format without the search and leave room to improve.
        cache_dir: directory of the trained models, one folder for each set of options.
    """

    steps: int = 900
    batch_size: int = 128
    lr: float | None = None
    final_lr_fraction: float = 0.1
    misleading_fraction: float = 0.5
    cache_dir: str = "runs/warm_starts"

    def __post_init__(self) -> None:
        at_least("warm_start.steps", self.steps, 1)
        at_least("warm_start.batch_size", self.batch_size, 1)
        if self.lr is not None:
            positive("warm_start.lr", self.lr)
        at_least("warm_start.final_lr_fraction", self.final_lr_fraction, 0)
        unit_fraction("warm_start.misleading_fraction", self.misleading_fraction)

    def directory(self, policy: dict[str, Any], data: dict[str, Any], seed: int) -> Path:
        """Folder of the warm start of this model on this task, named by a hash of both."""
        options = {k: v for k, v in data["init_args"].items() if k not in _IRRELEVANT}
        own = {k: v for k, v in vars(self).items() if k != "cache_dir"} | {"lr": self.rate(policy)}
        key = [own, policy["model"], policy["architecture"], policy["tokenizer"], seed]
        text = json.dumps([key, data["class_path"], options], sort_keys=True, default=str)
        return Path(self.cache_dir) / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def rate(self, policy: dict[str, Any]) -> float:
        """The learning rate for this model."""
        if self.lr is not None:
            return self.lr
        return _LR_FROM_SCRATCH if policy["model"] is None else _LR_PRETRAINED

    def config(
        self, directory: Path, policy: dict[str, Any], data: dict[str, Any], seed: int
    ) -> dict[str, Any]:
        """Configuration of ``sft fit`` that trains it into ``directory / "model"``."""
        return {
            "seed_everything": seed,
            "model": {
                "output_dir": str(directory / "model"),
                # Adapters come after it, and one device has nothing to shard.
                "policy": {**policy, "lora": None, "cpu_offload": False},
                "lr": self.rate(policy),
                "final_lr_fraction": self.final_lr_fraction,
            },
            "data": {
                "class_path": "tre_lightning.tasks.Demonstrations",
                "init_args": {
                    "task": data,
                    "steps": self.steps,
                    "batch_size": self.batch_size,
                    "misleading_fraction": self.misleading_fraction,
                },
            },
            "trainer": {
                "max_epochs": 1,
                "devices": 1,
                "default_root_dir": str(directory),
                "log_every_n_steps": 10,
                "enable_checkpointing": False,
            },
        }


def wait_for(directory: Path, seconds: float = _WAIT_SECONDS) -> None:
    """Wait until another rank has written the model there.

    Raises:
        TimeoutError: if it has not appeared in time.
    """
    end = time.monotonic() + seconds
    while not directory.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"no warm start appeared in {directory} within {seconds:.0f} s")
        time.sleep(0.5)
