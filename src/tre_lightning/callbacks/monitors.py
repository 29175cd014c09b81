"""Check that the metrics which callbacks monitor are logged."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tre_lightning.callbacks.checkpoint import IterationCheckpoint
from tre_lightning.methods import Method
from tre_lightning.tasks.base import PromptDataModule
from tre_lightning.training.diagnostics import EvaluationMetrics
from tre_lightning.training.ppo import PPOModule

_TRAINING = ("entropy/", "loss/", "policy/", "rollout/", "value/")


class MonitorCheck(Callback):
    """Checks after the first iteration, when all training metrics have been logged."""

    _checked = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a monitored metric that the iteration did not log."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not self._checked and not others_log(callbacks):
            known = [tag for tag in trainer.callback_metrics if not of_validation(tag)]
            refuse_unknown(
                (watched for watched in monitors(callbacks) if not of_validation(watched[1])), known
            )
        self._checked = True


def check_monitors(trainer: Trainer, module: PPOModule, data: PromptDataModule) -> None:
    """Refuse, before any work, a monitor that neither validation nor training can log.

    Raises:
        MisconfigurationException: naming the option and the metrics that there are.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if others_log(callbacks):
        return
    validates = trainer.limit_val_batches != 0
    tags = validation_tags(module, data) if validates else []
    watched = [
        (flag, monitor)
        for flag, monitor in monitors(callbacks)
        if (validates if flag == "checkpoint.monitor" else not monitor.startswith(_TRAINING))
    ]
    refuse_unknown(watched, tags)


def validation_tags(module: PPOModule, data: PromptDataModule) -> list[str]:
    """Metrics that a validation of these data may log; majority@k only for tasks with answers."""
    metrics = EvaluationMetrics(module.evaluation_args.num_responses)
    answers = type(data).answers is not PromptDataModule.answers
    names = [
        tag
        for tag in metrics.tags
        if not tag.endswith("_se")
        and (data.binary_scores or tag not in metrics.passes)
        and (answers or tag != metrics.majority)
    ]
    return [f"{split}/{name}" for split in data.heldout_prompts("val") for name in names]


def monitors(callbacks: Sequence[Callback]) -> Iterator[tuple[str, str]]:
    """The option and the metric of every callback that monitors one."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            ours = isinstance(callback, IterationCheckpoint)
            where = "checkpoint" if ours else f"trainer.callbacks {type(callback).__name__}"
            yield f"{where}.monitor", monitor


def refuse_unknown(watched: Iterable[tuple[str, str]], known: Collection[str]) -> None:
    """Raise MisconfigurationException for the first metric that is not known."""
    for flag, monitor in watched:
        if monitor not in known:
            there = f"use one of {', '.join(known)}" if known else "no validation runs"
            raise MisconfigurationException(f"{flag}={monitor} is not logged; {there}")


def of_validation(tag: str) -> bool:
    """Whether this is a metric of a validation."""
    return tag.startswith(("val/", "val_"))


def others_log(callbacks: Sequence[Callback]) -> bool:
    """Whether a callback of the user may log metrics of its own."""
    return any(
        type(callback).__module__.partition(".")[0] not in ("lightning", "tre_lightning")
        and not isinstance(callback, Method)
        for callback in callbacks
    )
