"""One progress bar over the whole run, with the numbers that matter."""

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from tre_lightning.training.optim import seconds_left, total_batches

_SHOWN = {
    "rollout/score": "score {:.3f}",
    "rollout/pass@1": "pass@1 {:.3f}",
    "entropy/full": "entropy {:.2f}",
    "entropy/tail_mass": "tail {:.1e}",
    "policy/approx_kl": "kl {:.1e}",
    "rollout/response_length": "length {:.1f}",
    "val/score": "val {:.3f}",
    "val/pass@1": "val {:.3f}",
    "sft/loss": "loss {:.3f}",
    "reward/loss": "loss {:.3f}",
    "reward/accuracy": "accuracy {:.3f}",
    "val/accuracy": "val {:.3f}",
}
# With scores of 0 and 1, pass@1 is the mean score: showing it once is enough.
_SAME = {"rollout/pass@1": "rollout/score", "val/score": "val/pass@1"}
_CLOCKS = ("rollout/seconds", "policy/update_seconds")


class RunProgress(ProgressBar):
    """A bar of iterations done and time left, with the numbers that show trouble first.

    Score (and pass@1, where it is another number), entropy of the whole vocabulary, mass outside
    the region, KL of the update, response length, the last validation, and seconds.

    On a terminal a live bar; elsewhere a line at once and then now and then.
    """

    def __init__(self, name: str = "ppo", lines: int = 20) -> None:
        """Keep the options.

        Args:
            name: what the bar is called.
            lines: lines of a run whose output is not a terminal, beside that of its first step.
        """
        super().__init__()
        self.name = name
        self.lines = max(lines, 1)
        self._enabled = True
        self._bar: Progress | None = None
        self._total: float = math.inf

    def disable(self) -> None:
        """Show nothing (ranks other than the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what is first to come, which with a large model takes a while."""
        super().setup(trainer, pl_module, stage)
        validates = stage == "validate" and trainer.limit_val_batches != 0
        if validates and self._enabled:
            print("loading the model, then its first scores", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar where the run starts or goes on."""
        self._total = total_batches(trainer)
        self._start, self._started = self._done(trainer), time.perf_counter()
        if not self._enabled or not sys.stdout.isatty():
            return
        whole = Column(no_wrap=True)  # only the bar itself gives way in a narrow terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}", table_column=whole),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=whole),
            TextColumn("eta", table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[numbers]}", table_column=whole),
            expand=True,
        )
        self._bar.start()
        total = None if math.isinf(self._total) else self._total
        self._bar.add_task(self.name, total=total, completed=self._done(trainer), numbers="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show this iteration's numbers."""
        done = self._done(trainer)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, numbers=_numbers(trainer))
        elif self._enabled:
            every = 50 if math.isinf(self._total) else max(int(self._total) // self.lines, 1)
            if done % every == 0 or done in (self._start + 1, self._total):
                rest = self._rest(done, seconds_left(trainer))
                print(f"{self.name} {done}{rest}  {_numbers(trainer)}", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Release the terminal."""
        self.teardown(trainer, pl_module, "fit")

    def _rest(self, done: int, limit: float) -> str:
        """Total and time left of a run with an end; ``limit`` is that of the clock, in seconds."""
        pace = (time.perf_counter() - self._started) / max(done - self._start, 1)
        left = min(pace * max(self._total - done, 0), limit)
        total = "" if math.isinf(self._total) else f"/{int(self._total)}"
        return total if math.isinf(left) else f"{total}  eta {timedelta(seconds=round(left))}"

    @staticmethod
    def _done(trainer: Trainer) -> int:
        return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _numbers(trainer: Trainer) -> str:
    """Those of :data:`_SHOWN` that were logged, and the seconds of the iteration."""
    values = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
    shown = []
    for tag, text in _SHOWN.items():
        other = _SAME.get(tag)
        repeated = other in values and (tag.startswith("val/") or values[other] == values.get(tag))
        if tag in values and not repeated:
            shown.append(text.format(values[tag]))
    if all(tag in values for tag in _CLOCKS):
        shown.append(f"{sum(values[tag] for tag in _CLOCKS):.1f} s")
    return " ".join(shown)
