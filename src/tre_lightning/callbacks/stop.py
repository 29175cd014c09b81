"""Graceful stop: Ctrl-C and SIGTERM end a run between two iterations, on all ranks together."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tre_lightning.common.distributed import highest

LAUNCHER = "TRE_LIGHTNING_LAUNCHER"  # environment: the process that starts the other ranks
_PAUSE = 1.0  # seconds; launchers pass on the Ctrl-C that their processes had from the terminal


class GracefulStop(Callback):
    """On Ctrl-C or SIGTERM, finishes and saves the iteration; a second Ctrl-C ends at once.

    Lightning's own handler of SIGTERM sends to the other ranks from wherever the signal meets it,
    between any two of the run's own exchanges; here ranks tell each other after an iteration.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0 = none
        self._interrupted_at = 0.0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, in place of those of Lightning."""
        _end_with_launcher(True)
        self._trainer = trainer
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread: the signals are somebody else's
                self._handlers[number] = signal.signal(number, self._handle)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers."""
        _end_with_launcher(False)
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers."""
        self.on_train_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        """Stop the trainer after this iteration if any rank got a signal."""
        self.received = highest(self.received, trainer.strategy.root_device)
        if self.received:  # as Lightning's own handler does; checkpoints come after this callback
            trainer._signal_connector.received_sigterm = True

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        """Stop after this batch of a validation, which a resumed run repeats."""
        if trainer.state.fn == "fit":
            self.on_train_batch_end(trainer)

    @property
    def stops_iterations(self) -> bool:
        """Whether the run trains, so that :meth:`request` has an iteration to finish."""
        return bool(self._handlers)

    def request(self, number: int) -> None:
        """Stop after this iteration, because of a signal."""
        first = not self.received
        self.received = self.received or number
        if first and self._trainer.is_global_zero:
            saved = " and saved" if self._trainer.checkpoint_callbacks else ""
            _say(f"stopping when this iteration is finished{saved}; Ctrl-C again to end at once")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            again = self._interrupted_at and time.monotonic() - self._interrupted_at > _PAUSE
            if again:
                self._end_now()
            self._interrupted_at = self._interrupted_at or time.monotonic()
        self.request(number)

    def _end_now(self) -> None:
        kill = getattr(self._trainer.strategy.launcher, "kill", None)
        if kill is not None:
            kill(signal.SIGKILL)
        if self._trainer.is_global_zero:
            _say("ended at once; go on with --ckpt_path last, where there is a checkpoint")
        os._exit(130)


def _say(line: str) -> None:
    # The signal may have come inside a write to sys.stderr, which cannot be entered again.
    os.write(2, f"\n{line}\n".encode())


def _end_with_launcher(wanted: bool) -> None:
    """On Linux, be killed where the process ends that started this one as a rank of the run."""
    started_by = os.environ.get(LAUNCHER) == str(os.getppid())
    if sys.platform == "linux" and (started_by or "TORCHELASTIC_RUN_ID" in os.environ):
        with suppress(OSError, AttributeError):
            # 1 = PR_SET_PDEATHSIG
            ctypes.CDLL(None).prctl(1, signal.SIGKILL if wanted else 0)
