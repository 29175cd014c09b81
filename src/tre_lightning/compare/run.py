"""Runs the trials of a comparison, several at a time, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from tre_lightning.compare.plan import Fields, Plan, Trial, Value, specification
from tre_lightning.compare.statistics import mean
from tre_lightning.compare.trial import LOG, RESULT, SPECIFICATION, write_json

_GRACE = 60.0  # seconds that a trial has to save its iteration


@dataclass
class _Running:
    trial: Trial
    process: "subprocess.Popen[bytes]"


class Runner:
    """Runs the trials that have no result yet; ``failed`` names those that failed."""

    def __init__(self, plan: Plan, folder: Path, jobs: int) -> None:
        """Keep the plan.

        Args:
            plan: the comparison.
            folder: what the plan's files are relative to.
            jobs: trials at a time, of one thread each.
        """
        self.plan = plan
        self.folder = folder
        self.jobs = jobs
        self.failed: list[str] = []
        self._running: list[_Running] = []
        self._started = time.monotonic()
        self._done = 0

    def check(self) -> None:
        """Raise ValueError if a trial in the output directory was made by another plan."""
        for trial in _existing(self.plan):
            file = trial.directory(self.plan) / SPECIFICATION
            made_by = json.loads(file.read_text())
            now = _comparable(specification(self.plan, trial, self.folder))
            if changed := [key for key in now if now[key] != made_by.get(key)]:
                raise ValueError(
                    f"{file.parent} was made with other {' and '.join(changed)}; give another "
                    "output, or delete it"
                )

    def run(self) -> None:
        """Run the sweep, choose values, run the final trials; any exception ends all processes."""
        try:
            self._run_all(self.plan.sweep, later=self._finals_left())
            self._run_all(self.plan.final(choose(self.plan)))
        except BaseException:
            self._stop()
            raise

    def _finals_left(self) -> int:
        """Number of final trials still to run; one that is done with any value counts as done."""
        done = {(t.method, t.seed) for t in _existing(self.plan) if result_of(self.plan, t)}
        pairs = {(name, seed) for name in self.plan.methods for seed in self.plan.seeds}
        return len(pairs - done)

    def _run_all(self, trials: Sequence[Trial], later: int = 0) -> None:
        """Run these trials; ``later`` is the number of others that come after them."""
        waiting = [trial for trial in trials if result_of(self.plan, trial) is None]
        finished = [trial for trial in trials if trial not in waiting]
        warm = {trial.seed for trial in finished}
        if finished:
            print(f"{len(finished)} of {len(trials)} trials are done already", flush=True)
        while waiting or self._running:
            while len(self._running) < self.jobs and (trial := self._next(waiting, warm)):
                waiting.remove(trial)
                self._start(trial)
            time.sleep(0.1)
            for running in [r for r in self._running if r.process.poll() is not None]:
                self._running.remove(running)
                if self._end(running):
                    warm.add(running.trial.seed)
                self._report(len(waiting) + len(self._running) + later)

    def _next(self, waiting: Sequence[Trial], warm: set[int]) -> Trial | None:
        """The first trial that may start: one trial alone trains the warm start (SFT) of a seed."""
        busy = {running.trial.seed for running in self._running}
        able = (t for t in waiting if t.seed in warm or t.seed not in busy)
        return next(able, None)

    def _start(self, trial: Trial) -> None:
        directory = trial.directory(self.plan)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / SPECIFICATION
        write_json(file, specification(self.plan, trial, self.folder))
        with (directory / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tre_lightning.compare", "--trial", str(file)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )
        self._running.append(_Running(trial, process))

    def _end(self, running: _Running) -> bool:
        trial, code = running.trial, running.process.returncode
        self._done += 1
        if code == 0 and result_of(self.plan, trial) is not None:
            print(f"done    {trial.name}", end="", flush=True)
            return True
        self.failed.append(trial.name)
        log = trial.directory(self.plan) / LOG
        print(f"FAILED  {trial.name} (exit code {code}): {_last_line(log)}", end="", flush=True)
        return False

    def _report(self, left: int) -> None:
        elapsed = time.monotonic() - self._started
        remaining = elapsed / self._done * left
        print(f"  elapsed {_clock(elapsed)}, {left} left, about {_clock(remaining)}", flush=True)

    def _stop(self) -> None:
        for running in self._running:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for running in self._running:
            try:
                running.process.wait(max(0.0, end - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                end = 0.0
            finally:
                with suppress(ProcessLookupError):  # its own children too
                    os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()


def result_of(plan: Plan, trial: Trial) -> Fields | None:
    """The result of a trial; None = it is not finished."""
    file = trial.directory(plan) / RESULT
    if not file.exists():
        return None
    result: Fields = json.loads(file.read_text())
    return result


def choose(plan: Plan) -> dict[str, Value | None]:
    """The value of each method: the highest mean of ``choose_by`` over all the sweep seeds.

    The first of equal ones. A value with a trial that failed is not chosen; a method without any
    value is left out.
    """
    chosen: dict[str, Value | None] = {}
    for name, method in plan.methods.items():
        if len(method.settings) == 1:
            chosen[name] = method.settings[0]
            continue
        means = {value: _score(plan, name, value) for value in method.settings}
        complete = {value: score for value, score in means.items() if score is not None}
        if complete:
            chosen[name] = max(complete, key=complete.__getitem__)
    return chosen


def _score(plan: Plan, method: str, value: Value | None) -> float | None:
    """Mean of ``choose_by`` over the sweep seeds; None where one has none."""
    scores = []
    for seed in plan.sweep_seeds:
        result = result_of(plan, Trial(method, value, seed))
        score = None if result is None else result["final"].get(plan.choose_by)
        if result is not None and plan.choose_by not in result["final"]:
            raise ValueError(
                f"choose_by={plan.choose_by} is not logged; give one of "
                f"{', '.join(result['final'])}"
            )
        if score is None:
            return None
        scores.append(score)
    return mean(scores)


def _existing(plan: Plan) -> list[Trial]:
    """Every trial of the plan, with any value, that was started."""
    trials = [
        Trial(name, value, seed)
        for seed in [*plan.sweep_seeds, *plan.seeds]
        for name, method in plan.methods.items()
        for value in method.settings
    ]
    return [t for t in trials if (t.directory(plan) / SPECIFICATION).exists()]


def _comparable(content: Mapping[str, object]) -> Fields:
    """A specification as read back from its file, without options that change no result."""
    read: Fields = json.loads(json.dumps(content))
    read.pop("keep_checkpoints")
    return read


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), f"see {log}")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
