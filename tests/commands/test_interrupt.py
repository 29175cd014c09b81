"""Ctrl-C: the iteration is finished and saved, on all ranks; a second one ends at once."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
from tre_lightning.cli.main import command_to_resume
from tre_lightning.methods import EntropyBonus, PolicyOutputs, Tokens

UPDATE = 2 * runs.STEPS_AN_ITERATION + 2  # within the third iteration

PRECISION = "--trainer.precision=64-true"


class HoldingBonus(EntropyBonus):
    """An entropy bonus that holds the update named by HOLD (``update:9``), as runs.PlusCountdown
    does a batch."""

    calls = 0

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        self.calls += 1
        if os.environ.get("HOLD") == f"update:{self.calls}":
            file = Path(os.environ["HOLD_FILE"])
            file.touch()
            while file.exists():
                time.sleep(0.01)
        return super().per_token(outputs, tokens)


CHANGES: dict[str, Any] = {
    "trainer.callbacks": [{"class_path": "test_interrupt.HoldingBonus"}],
    "model.ppo": {**runs.TINY["model"]["ppo"], "micro_batch_size": 16},  # one call an update
    "checkpoint": {"every_n_iterations": 2},  # stopped in the third: saved all the same
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption; tests only read it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    runs.run(run_dir, changes=CHANGES)
    return run_dir


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in double precision, to compare with several processes."""
    run_dir = tmp_path_factory.mktemp("precise") / "run"
    runs.run(run_dir, PRECISION, changes=CHANGES)
    return run_dir


@contextmanager
def held(
    run_dir: Path, where: str, *flags: str, fresh: bool = False
) -> Iterator[tuple[runs.Process, Path]]:
    """A process that waits at a batch or an update while the file that comes with it exists."""
    hold = run_dir.with_name("hold")
    words = runs.words(run_dir, *flags, changes=CHANGES)
    with runs.process(words, fresh=fresh, HOLD=where, HOLD_FILE=str(hold)) as process:
        runs.wait_until(hold.exists, process)
        yield process, hold


def ended(process: runs.Process, hold: Path | None = None) -> str:
    """What the process printed until its end; ``hold`` is to be let go, by every rank."""

    def over() -> bool:
        if hold is not None:
            hold.unlink(missing_ok=True)
        return process.poll() is not None

    runs.wait_until(over)
    return process.communicate()[0]


@pytest.mark.parametrize("where", ["train:2", f"update:{UPDATE}"])
def test_ctrl_c_finishes_the_iteration(where: str, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with held(run_dir, where) as (process, hold):
        process.send_signal(signal.SIGINT)
        printed = ended(process, hold)
    assert process.returncode == 130, printed[-3000:]
    assert "Traceback" not in printed and "Ctrl-C again to end at once" in printed
    assert runs.saved_iteration(run_dir) == 3
    (last,) = [line for line in printed.splitlines() if line.startswith("stopped by Ctrl-C")]
    command = last.partition("go on with: ")[2]
    assert command.startswith("python -m tre_lightning fit --config ")
    # The very command that it gives goes on to the end.
    with runs.process(shlex.split(command)[3:]) as process:
        printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    runs.assert_same_run(run_dir, whole)


def test_a_second_ctrl_c_ends_at_once(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with held(run_dir, f"update:{UPDATE}") as (process, hold):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # as launchers pass on what their processes had
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed = ended(process)  # held all the time
        hold.unlink()
    assert process.returncode == 130 and "Traceback" not in printed, printed[-3000:]
    assert runs.saved_iteration(run_dir) == 2
    runs.resume(run_dir, changes=CHANGES)
    runs.assert_same_run(run_dir, whole)


def test_ctrl_c_before_training_ends_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with held(run_dir, "val:0") as (process, _):  # the first validation
        process.send_signal(signal.SIGINT)
        printed = ended(process)
    assert process.returncode == 130, printed[-3000:]
    assert printed.splitlines()[-1] == "stopped by Ctrl-C; nothing was saved yet"
    assert "Traceback" not in printed and not (run_dir / "checkpoints").exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("number", "everyone", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_all_ranks_stop_after_the_same_iteration(
    number: signal.Signals, everyone: bool, code: int, precise: Path, tmp_path: Path
) -> None:
    run_dir, flags = tmp_path / "run", ("--trainer.strategy=ddp", "--trainer.devices=2")
    with held(run_dir, "train:2", PRECISION, *flags, fresh=True) as (process, hold):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if everyone:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        printed = ended(process, hold)
    assert process.returncode == code, printed[-3000:]
    assert "Traceback" not in printed and printed.count("stopped by ") == 1
    assert children and not any(runs.is_running(int(pid)) for pid in children)
    assert runs.saved_iteration(run_dir) == 3
    runs.run(run_dir, PRECISION, "--ckpt_path=last", changes=CHANGES)  # on one device
    assert runs.distance(runs.weights(run_dir), runs.weights(precise)) < 1e-6


def test_the_command_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "--config", "a b.yaml", "--ckpt_path", "best", "--ckpt_path=x.ckpt", "-x=1"]
    expected = "fit --config 'a b.yaml' -x=1 --ckpt_path last"
    assert command_to_resume(words) == f"python -m tre_lightning {expected}"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tre-lightning"])
    assert command_to_resume(words) == f"tre-lightning {expected}"
