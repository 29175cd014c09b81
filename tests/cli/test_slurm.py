"""A job that SLURM queues again goes on by itself; no SLURM is needed here."""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

import runs
from tre_lightning.cli.config_files import with_layers

JOB = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


class TimeIsUp(Callback):
    """Sends this process the signal that SLURM sends, in a hook of ``fit``."""

    def __init__(self, hook: str, iteration: int = 0, number: int = int(signal.SIGUSR1)) -> None:
        def send(trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if pl_module.iteration == iteration and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        setattr(self, hook, send)


def with_signal(**options: Any) -> dict[str, Any]:
    up = {"class_path": "test_slurm.TimeIsUp", "init_args": options}
    return {"trainer.callbacks": [runs.TRE, up], "summary": {"export": False}}


WITHOUT = {"summary": {"export": False}}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a job; the file has what scontrol was asked."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return tmp_path / "asked"


def stopped(run_dir: Path, **options: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        runs.run(run_dir, changes=with_signal(**options))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_queued_again_it_goes_on_to_the_same_result(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    code = stopped(run_dir, hook="on_train_batch_start", iteration=2)
    assert code == 128 + signal.SIGUSR1
    assert asked.read_text() == "requeue 1234567\n"
    assert runs.saved_iteration(run_dir) == 3  # finished, and no further one
    assert not list(run_dir.glob("hpc_ckpt*"))
    assert "stopped by SIGUSR1; the job is queued again" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    runs.run(run_dir, changes=WITHOUT)  # the same command
    runs.run(tmp_path / "whole", changes=WITHOUT)
    assert runs.distance(runs.weights(run_dir), runs.weights(tmp_path / "whole")) == 0.0


def test_stopped_before_training_it_is_queued_again(asked: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert stopped(run_dir, hook="on_validation_start") == 128 + signal.SIGUSR1
    assert asked.read_text() == "requeue 1234567\n"
    assert not (run_dir / "checkpoints").exists() and not list(run_dir.glob("hpc_ckpt*"))


def test_preempted_it_is_saved_and_left_to_slurm(asked: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = {"hook": "on_train_batch_start", "number": int(signal.SIGTERM)}
    assert stopped(run_dir, **options) == 128 + signal.SIGTERM
    assert not asked.exists() and runs.saved_iteration(run_dir) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {},  # started by hand a second time
        {"SLURM_RESTART_COUNT": "0"},
        {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "7654321"},  # the run is another job's
    ],
)
def test_another_run_is_protected(
    asked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str],
    refusal: runs.Said,
) -> None:
    run_dir = tmp_path / "run"
    stopped(run_dir, hook="on_train_batch_start")
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    assert "already holds a run" in refusal(runs.run, run_dir, changes=WITHOUT)


def test_an_array_is_queued_again_by_its_task(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "99")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    stopped(tmp_path / "run", hook="on_validation_start")
    assert asked.read_text() == "requeue 99_3\n"


def test_the_script_of_the_docs_starts_one_command_again_and_again(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (runs.ROOT / "docs" / "scaling.md").read_text()
    (script,) = (
        block for block in re.findall(r"```sh\n(.*?)```", page, re.S) if "sbatch" in block.lower()
    )
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, re.M))
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["signal"].startswith("USR1@")  # without B: the tasks get it, not the shell
    for name, text in (("srun", 'exec "$@"'), ("python", 'printf "%s\\n" "$@"')):
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
    said = []
    for restarts in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        found = subprocess.run(
            ["bash", "-c", script], cwd=runs.ROOT, capture_output=True, text=True, check=True
        )
        said.append(found.stdout.splitlines())
    assert said[0] == said[1]
    assert said[0][:3] == ["-m", "tre_lightning", "fit"]
    assert f"runs/math_7b_{JOB['SLURM_JOB_ID']}" in said[0]
    monkeypatch.chdir(runs.ROOT)
    assert len(with_layers(said[0][2:])) > 10  # its files are here
