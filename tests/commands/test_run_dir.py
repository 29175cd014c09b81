"""The run directory and other paths: found wherever they are given, and written by one process."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import Namespace

import runs
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.common.paths import expanded, locked
from tre_lightning.compare.plan import read_plan


@contextmanager
def at_work(file: Path) -> Iterator[None]:
    """Hold a lock file as another process would."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where the work would begin."""
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)


# ----- the home directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("parsed_only")
def test_home_in_every_path(home: Path) -> None:
    layer = home / "layer.yaml"
    layer.write_text(
        "trainer: {max_epochs: 7, logger: [{class_path: tre_lightning.callbacks.loggers.CSV, "
        "init_args: {save_dir: ~/logs}}]}"
    )
    (home / "top.yaml").write_text("layers: [~/layer.yaml]\nwarm_start: {cache_dir: ~/warm}")
    puzzles = home / "puzzles.jsonl"
    puzzles.write_text('{"nums": [1, 2], "target": 3}\n')
    cli = main(
        [
            *runs.words(home / "unused")[:-1],
            "--config=~/top.yaml",
            "--trainer.default_root_dir=~/run",
            "--data.init_args.train_file",
            "~/puzzles.jsonl",
            "--data.init_args.eval_file=~/puzzles.jsonl",
        ]
    )
    assert isinstance(cli, PPOCLI)
    assert cli.trainer.default_root_dir == cli.run_dir == f"{home}/run"
    assert cli.trainer.max_epochs == 7
    assert cli.trainer.loggers[0].save_dir == f"{home}/logs"
    assert cli.options.data.init_args.eval_file == str(puzzles)
    assert cli.warm_start_dir.parent == home / "warm"
    assert "~" not in str(cli.options.as_dict())


def test_a_run_in_the_home_directory_is_protected(home: Path, refusal: runs.Said) -> None:
    (home / "run" / "checkpoints").mkdir(parents=True)
    (home / "run" / "checkpoints" / "last.ckpt").touch()
    words = [*runs.words(home / "x")[:-1], "--trainer.default_root_dir=~/run"]
    assert f"trainer.default_root_dir={home}/run already holds a run" in refusal(main, words)


def test_home_in_a_comparison(home: Path) -> None:
    (home / "tiny.yaml").write_text("trainer: {max_epochs: 1}")
    plan = {
        "configs": ["~/tiny.yaml"],
        "methods": {"ppo": {"config": None}},
        "seeds": [1],
        "output": "~/out",
        "baseline": "ppo",
        "set": {"warm_start.cache_dir": "~/warm"},
    }
    (home / "plan.yaml").write_text(yaml.safe_dump(plan))
    read = read_plan(home / "plan.yaml")
    assert read.output == f"{home}/out" and read.set == {"warm_start.cache_dir": f"{home}/warm"}


@given(st.text(max_size=8), st.sampled_from(["", " ", "a~", "~ ", "~!", "x/~/", "=~/"]))
def test_only_a_leading_tilde_is_the_home_directory(text: str, start: str) -> None:
    if not text.startswith("~"):
        assert expanded(start + text) == start + text


def test_containers_are_looked_into(home: Path) -> None:
    space = Namespace(
        a="~/a", b=Namespace(c=["~/c", {"d": "~", "e": 1}]), f=("~nobody-here/x", None)
    )
    found: Any = expanded(space)
    assert found.a == f"{home}/a" and found.b.c == [f"{home}/c", {"d": str(home), "e": 1}]
    assert found.f == ("~nobody-here/x", None)


# ----- no directory


@pytest.mark.parametrize("option", ["trainer.default_root_dir", "warm_start.cache_dir"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_where_a_directory_should_be(
    tmp_path: Path, refusal: runs.Said, option: str, below: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    words = runs.words(tmp_path / "run", f"--{option}={file}{below}")
    assert f"{option}={file}{below}: {file} is no directory" in refusal(main, words)
    for command in ("test", "predict"):
        assert f"{file} is no directory" in refusal(main, [command, *words[1:]])


# ----- one process at a time


def test_two_processes_cannot_write_one_run(tmp_path: Path, refusal: runs.Said) -> None:
    run_dir = tmp_path / "run"
    with at_work(run_dir / "lock"):
        message = refusal(main, runs.words(run_dir))
        assert message == (
            f"error: another process is at work in {run_dir}; wait for its end, stop it or "
            "give another directory"
        )
        # What only reads does not care.
        runs.run(run_dir, "--trainer.limit_test_batches=1", command="test")
    assert not (run_dir / "checkpoints").exists()


def test_two_processes_cannot_write_one_model(tmp_path: Path, refusal: runs.Said) -> None:
    words = ["reward", "fit", "--data=PreferencePairs", f"--model.output_dir={tmp_path}/out/model"]
    words += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}/run"]
    with at_work(tmp_path / "out" / "model.lock"):
        assert f"another process is at work in {tmp_path}/out/model" in refusal(main, words)
    with at_work(tmp_path / "run" / "lock"):
        assert f"another process is at work in {tmp_path}/run" in refusal(main, words)


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for directory in (tmp_path / "new" / "run", there):
        with locked(directory):
            assert (directory / "lock").exists()
        with locked(directory):
            pass
    assert not (tmp_path / "new" / "run").exists() and list(there.iterdir()) == []


def test_other_ranks_of_the_run_are_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK"):
        with monkeypatch.context() as patch, at_work(tmp_path / "lock"):
            patch.setenv(name, "1")
            with locked(tmp_path):
                pass
            patch.setenv(name, "0")
            with pytest.raises(ValueError, match="another process"), locked(tmp_path):
                pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_second_warm_start_waits_for_the_first_and_takes_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = runs.run(tmp_path / "first", "--trainer.max_epochs=1")
    assert isinstance(first, PPOCLI)
    model = first.warm_start_dir / "model"
    cache = tmp_path / "cache"
    target = cache / first.warm_start_dir.name

    def finish() -> None:
        with at_work(target / "lock"):
            started.set()
            time.sleep(3.0)
            (target / "model").symlink_to(model)
            os.unlink(target / "lock")

    started = threading.Event()
    thread = threading.Thread(target=finish)
    thread.start()
    started.wait()
    flags = (f"--warm_start.cache_dir={cache}", "--trainer.max_epochs=1")
    second = runs.run(tmp_path / "second", *flags)
    thread.join()
    assert f"waiting for another process at work in {target}" in capsys.readouterr().err
    assert isinstance(second, PPOCLI) and second.warm_start_seconds is None
    assert runs.distance(runs.weights(tmp_path / "first"), runs.weights(tmp_path / "second")) == 0.0
