"""Refuse options of Lightning's Trainer that do not apply to PPO, in one line before any work."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection

from tre_lightning.tasks.base import PromptDataModule
from tre_lightning.tasks.batching import spans


@dataclass(frozen=True)
class Rule:
    """Which values of an argument work, and what to use instead of the others."""

    works: Callable[[Any], bool]
    instead: str


def _whole(value: object) -> bool:
    """Whether a limit is not given or means all batches: 1.0, while 1 is one batch."""
    return value is None or (isinstance(value, float) and value == 1.0)


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: value is None or value >= least


# Of every command.
COMMON: dict[str, Rule] = {
    "barebones": Rule(
        lambda value: not value,
        "would switch off what a run records and needs; leave it out, and look for lost time with "
        "trainer.profiler=simple",
    ),
    "default_root_dir": Rule(
        lambda value: bool(value) and "://" not in str(value),
        "is no local directory; give one, such as runs/mine",
    ),
    "max_epochs": Rule(
        lambda value: value != 0, "trains nothing; give at least 1, or -1 for a run without end"
    ),
    "max_steps": Rule(
        lambda value: value != 0, "trains nothing; leave it out and give trainer.max_epochs"
    ),
    "model_registry": Rule(
        lambda value: not value, "has no effect, nothing is uploaded from here; leave it out"
    ),
    "num_nodes": Rule(_at_least(1), "must be at least 1"),
    "overfit_batches": Rule(
        lambda value: not value,
        "has no effect on batches that are drawn anew; leave it out and give the data few rows",
    ),
    "check_val_every_n_epoch": Rule(
        lambda value: value is not None and value >= 1, "must be a number of epochs, at least 1"
    ),
}
# Of the supervised commands, whose updates are Lightning's.
SUPERVISED: dict[str, Rule] = COMMON | {
    "accumulate_grad_batches": Rule(_at_least(1), "must be at least 1"),
    "gradient_clip_val": Rule(_at_least(0), "must be at least 0 (off)"),
    "log_every_n_steps": Rule(_at_least(0), "must be at least 0 (off)"),
}
_CLIPPED = "is not used by PPO's updates; leave it out and give model.optim.max_grad_norm"
# Of reinforcement learning, whose training step is a whole PPO iteration with many updates.
PPO: dict[str, Rule] = COMMON | {
    "accumulate_grad_batches": Rule(
        lambda value: value == 1,
        "is not used by PPO's updates; leave it at 1: model.ppo.num_minibatches says how many "
        "responses an update has, and model.ppo.micro_batch_tokens how many fit in memory",
    ),
    "gradient_clip_val": Rule(lambda value: not value, _CLIPPED),
    "gradient_clip_algorithm": Rule(lambda value: value is None, _CLIPPED),
    "limit_train_batches": Rule(
        _whole, "would skip prompts; leave it out and give data.init_args.iterations_per_epoch"
    ),
    "val_check_interval": Rule(
        _whole,
        "is not used, validation runs between epochs; leave it out and give "
        "data.init_args.iterations_per_epoch or trainer.check_val_every_n_epoch",
    ),
    "log_every_n_steps": Rule(
        _at_least(1), "must be at least 1 iteration; trainer.logger=false logs nothing"
    ),
}

# These change or count the updates of Lightning's own loop.
_OF_AUTOMATIC_UPDATES = (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)


def check_options(given: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise ValueError for the first argument of ``trainer`` that its rule does not let through."""
    for name, rule in rules.items():
        if not rule.works(value := given.get(name)):
            raise ValueError(f"trainer.{name}={value} {rule.instead}")


def check_ppo_callbacks(callbacks: Sequence[Callback], own: Mapping[str, Callback]) -> None:
    """Refuse callbacks that PPO has built in, or that would change its updates.

    Args:
        callbacks: those of ``trainer.callbacks``.
        own: those of every run, by the option that configures them.

    Raises:
        ValueError: naming the class and what to do instead.
    """
    for callback in callbacks:
        name = f"trainer.callbacks {type(callback).__name__}"
        for option, ours in own.items():
            if type(callback) is type(ours):
                raise ValueError(f"{name} is in every run; leave it out and set {option}.*")
        if isinstance(callback, Checkpoint):
            raise ValueError(
                f"{name} counts optimiser steps, of which an iteration has many; leave it out and "
                "set checkpoint.every_n_iterations, checkpoint.monitor or checkpoint.keep_all"
            )
        if isinstance(callback, _OF_AUTOMATIC_UPDATES):
            raise ValueError(f"{name} changes Lightning's updates, and PPO makes its own; drop it")


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings that can only be seen on the built trainer.

    Raises:
        ValueError: naming the argument and what to do instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DeviceStatsMonitor | LearningRateMonitor) and not trainer.loggers:
            raise ValueError(
                f"trainer.callbacks {type(callback).__name__} has no use with trainer.logger=false;"
                " leave one of them out"
            )
    if type(trainer.strategy.checkpoint_io) is not TorchCheckpointIO:
        raise ValueError(
            f"trainer.plugins: {type(trainer.strategy.checkpoint_io).__name__} writes checkpoints "
            "in its own way, which could not be read back here; leave it out"
        )


def check_limits(trainer: Trainer, data: PromptDataModule) -> None:
    """Refuse a fraction of the held-out batches that is less than one batch.

    Raises:
        ValueError: naming the argument, the set and the least fraction.
    """
    for stage, limit in (("val", trainer.limit_val_batches), ("test", trainer.limit_test_batches)):
        for split, prompts in data.heldout_prompts(stage).items():
            batches = len(spans(len(prompts), data.eval_batch_size, trainer.world_size))
            if isinstance(limit, float) and limit > 0.0 and int(limit * batches) == 0:
                raise ValueError(
                    f"trainer.limit_{stage}_batches={limit} of the {batches} batches of {split} "
                    f"is less than one; give at least {1 / batches:.3g}, or a whole number"
                )


def blame(message: str, given: Mapping[str, Any]) -> str:
    """Lightning's message, with the arguments of ``trainer`` that it is about in front."""
    if re.match(r"\w+\.\w", message):  # names an option already
        return message
    words = set(re.findall(r"\w+", message))
    default = {
        name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()
    }
    flags = [
        f"trainer.{name}={value}"
        for name, value in given.items()
        if name != "callbacks"
        and value != default.get(name)
        and (name in words or (isinstance(value, str) and repr(value) in message))
    ]
    return f"{', '.join(flags) or 'trainer'}: {message}"
