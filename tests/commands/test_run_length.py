"""One notion of a run's length, however it is given: rates, progress, stops and resumes."""

import math
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer

import runs
from tre_lightning.cli.main import main
from tre_lightning.tasks.base import IterationLoader
from tre_lightning.training.optim import has_end, seconds_left, total_batches

DECAY = "--model.optim.final_lr_fraction=0.5"
QUIET = {"summary": {"export": False}}


def trainer(**options: Any) -> Any:
    """What :func:`total_batches` asks of a trainer; a manual module has 4 steps a batch."""
    manual = options.pop("manual", False)
    module = SimpleNamespace(automatic_optimization=not manual, steps_a_batch=4)
    defaults = {
        "max_epochs": -1,
        "max_steps": -1,
        "num_training_batches": 5,
        "accumulate_grad_batches": 1,
        "lightning_module": module,
    }
    return SimpleNamespace(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, math.inf),
        ({"max_epochs": 3}, 15),
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 5),
        ({"max_steps": 3, "max_epochs": 2}, 3),
        # Steps of 2 + 2 + 1 batches an epoch: 4 steps are an epoch (5 batches) and 2 batches.
        ({"max_steps": 4, "accumulate_grad_batches": 2}, 7),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 5),
        ({"max_steps": 4, "accumulate_grad_batches": 2, "num_training_batches": math.inf}, 8),
        ({"max_steps": 8, "manual": True}, 2),
        ({"max_steps": 9, "manual": True}, 3),  # the iteration that reaches the ninth
        ({"max_steps": 9, "max_epochs": 9, "manual": True}, 3),
        ({"max_steps": 90, "max_epochs": 2, "manual": True}, 10),
    ],
)
def test_the_run_ends_with_what_comes_first(options: dict[str, Any], batches: float) -> None:
    given = trainer(**options)
    assert total_batches(given) == batches
    assert has_end(given) == math.isfinite(batches)


def test_without_any_limit_there_are_1000_epochs_unless_a_timer_ends_them() -> None:
    assert has_end(trainer(max_epochs=None, callbacks=[]))
    assert not has_end(trainer(max_epochs=None, callbacks=[Timer(timedelta(hours=1))]))


def test_the_clock_that_ends_first_counts() -> None:
    timers = [Timer(timedelta(hours=2)), Timer(timedelta(hours=1)), Timer()]
    assert seconds_left(trainer(callbacks=timers)) == 3600.0
    assert seconds_left(trainer(callbacks=[])) == math.inf


# Four optimiser steps an iteration, two iterations an epoch.
@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (("--trainer.max_epochs=-1", "--trainer.max_steps=12"), [0.01, 0.0075, 0.005]),
        (("--trainer.max_epochs=9", "--trainer.max_steps=5"), [0.01, 0.005]),
    ],
)
def test_rate_and_progress_know_the_end(
    tmp_path: Path, flags: tuple[str, ...], rates: list[float]
) -> None:
    printed = runs.output_of(tmp_path / "run", DECAY, *flags, changes=QUIET)
    logged = [rate for _, rate in runs.scalars(tmp_path / "run")["policy/lr"]]
    assert logged == pytest.approx(rates)
    assert re.findall(r"^ppo (\d+/\d+)  eta", printed, re.M) == [
        f"{done}/{len(rates)}" for done in range(1, len(rates) + 1)
    ]


def supervised(run_dir: Path, *flags: str) -> list[str]:
    flags = (f"--model.output_dir={run_dir}-model", f"--trainer.default_root_dir={run_dir}", *flags)
    return ["--trainer.accelerator=cpu", "--trainer.max_epochs=-1", *flags]


def test_what_needs_an_end_asks_for_one(tmp_path: Path, refusal: runs.Said) -> None:
    run_dir = tmp_path / "run"
    for end in ("--trainer.max_epochs=-1", "--trainer.max_time=00:01:00:00"):
        words = runs.words(run_dir, DECAY, end, changes={"trainer.max_epochs": None, **QUIET})
        message = refusal(main, words)
        assert "optim.final_lr_fraction=0.5 needs a run with an end" in message, message
    pairs = ["reward", "fit", "--data=PreferencePairs", *supervised(run_dir)]
    assert "model.final_lr_fraction=0.1 needs a run with an end" in refusal(main, pairs)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trainer.max_epochs=0", "trainer.max_epochs=0"),
        ("--trainer.max_steps=0", "trainer.max_steps=0"),
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches=0"),
        ("--trainer.min_epochs=3", "trainer.min_epochs=3 is above trainer.max_epochs=2"),
        ("--trainer.limit_train_batches=0.2", "trainer.limit_train_batches=0.2"),
    ],
)
def test_a_run_of_nothing_or_of_contradictions_is_refused(
    tmp_path: Path, refusal: runs.Said, flag: str, message: str
) -> None:
    assert message in refusal(main, runs.words(tmp_path / "run", flag))


# ----- resumed with another length


EPOCH = {"data.init_args.iterations_per_epoch": 3, "trainer.max_epochs": 2, **QUIET}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs of 3 iterations."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    runs.run(run_dir, changes={**EPOCH, "checkpoint": {"keep_all": True}})
    return run_dir


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.init_args.iterations_per_epoch=4"], "iterations_per_epoch=4 .* a run of 3;"),
        (["--trainer.max_epochs=1"], "trainer.max_epochs=1 of 3 .* checkpoint's 6 iterations"),
        (["--trainer.max_steps=20"], "trainer.max_steps=20 is less than .* 24 optimiser steps"),
    ],
)
def test_a_length_that_does_not_fit_the_checkpoint_is_refused(
    whole: Path, refusal: runs.Said, flags: list[str], message: str
) -> None:
    words = runs.words(whole, "--ckpt_path=last", *flags, changes=EPOCH)
    assert re.search(message, refusal(main, words))


def test_a_finished_run_says_that_nothing_is_left(whole: Path) -> None:
    printed = runs.output_of(whole, "--ckpt_path=last", changes=EPOCH)
    assert "no iteration was left after the 6 of the checkpoint" in printed


def test_other_prompts_are_told(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, told in ((["--seed_everything=7"], 1), ([], 0)):
        runs.run(whole, "--ckpt_path=last", *flags, changes=EPOCH)
        err = capsys.readouterr().err
        assert err.count("warning: the training prompts are not those") == told, err


def test_another_batch_size_leaves_no_prompt_out_and_takes_none_twice() -> None:
    def taken(loader: IterationLoader, batches: int) -> list[tuple[int, int]]:
        found: list[Any] = []
        while len(found) < batches:
            found += list(loader)
        return found

    small = IterationLoader(lambda *args: args, 2, 4)  # type: ignore[arg-type, return-value]
    assert taken(small, 4) == [(0, 0), (1, 4), (2, 8), (3, 12)]
    large = IterationLoader(lambda *args: args, 2, 10)  # type: ignore[arg-type, return-value]
    large.load_state_dict(small.state_dict())
    assert taken(large, 2) == [(4, 16), (5, 26)]
    large.go_back_to(5)
    assert taken(large, 2) == [(5, 26), (6, 36)]
    old = IterationLoader(lambda *args: args, 2, 4)  # type: ignore[arg-type, return-value]
    old.load_state_dict({"iteration": 3})  # of a checkpoint that knew no place
    assert taken(old, 2) == [(3, 12), (4, 16)]


TIMER = {"class_path": "lightning.pytorch.callbacks.Timer"}
SOON = {"milliseconds": 1}


@pytest.mark.parametrize("how", ["max_time", "Timer"])
def test_a_run_that_the_clock_ended_goes_on(whole: Path, tmp_path: Path, how: str) -> None:
    """It ends within its first epoch; that epoch is none that Lightning may count as done."""
    run_dir = tmp_path / "run"
    if how == "Timer":
        timer = {**TIMER, "init_args": {"duration": SOON}}
        runs.run(run_dir, changes={**EPOCH, "trainer.callbacks": [runs.TRE, timer]})
    else:
        runs.run(run_dir, changes={**EPOCH, "trainer.max_time": SOON})
    assert runs.saved_iteration(run_dir) == 1
    runs.resume(run_dir, changes=EPOCH)
    assert runs.distance(runs.weights(run_dir), runs.weights(whole)) == 0.0
    left, right = runs.scalars(run_dir), runs.scalars(whole)
    assert all(left[tag] == right[tag] for tag in right if not tag.startswith(("val/", "epoch")))
