"""Requeueing by SLURM: the run is saved, and resumes automatically when the job restarts."""

import os
import signal
import subprocess
import sys
from types import FrameType, TracebackType
from typing import Any, Self

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tre_lightning.callbacks.stop import GracefulStop
from tre_lightning.common.distributed import job_id


def is_started_anew() -> bool:
    """Whether SLURM restarted this job."""
    return bool(job_id()) and os.environ.get("SLURM_RESTART_COUNT", "") not in ("", "0")


class Requeue:
    """Ends ``fit`` on the signal that SLURM sends before the time limit, and requeues the job.

    Instead of Lightning's own handler, which would save in the middle of an iteration. While the
    run trains, the iteration is finished and saved; before that the command ends at once.
    """

    def __init__(self, trainer: Trainer, *, wanted: bool) -> None:
        """Replace Lightning's handler; does nothing outside SLURM or without auto_requeue."""
        environment = trainer._accelerator_connector.cluster_environment
        self.ended_early = False  # before there was an iteration to finish
        self.number: int | None = None  # of the signal, where there is one to wait for
        self._trainer = trainer
        self._before: Any = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            environment.auto_requeue = False
            self.number = environment.requeue_signal if wanted else None

    def __enter__(self) -> Self:
        if self.number is not None:
            self._before = signal.signal(self.number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.number is not None:
            signal.signal(self.number, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        stop = next((c for c in self._trainer.callbacks if isinstance(c, GracefulStop)), None)  # type: ignore[attr-defined]
        if stop is None or not stop.stops_iterations:
            self.ended_early = True
            raise SIGTERMException
        stop.request(number)

    def submit(self) -> None:
        """Requeue the job, on the first rank only."""
        if not self._trainer.is_global_zero:
            return
        job = job_id()
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            subprocess.run(["scontrol", "requeue", str(job)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"warning: scontrol requeue {job} failed ({error})", file=sys.stderr)
