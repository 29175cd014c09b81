"""However a run was interrupted, it goes on to the very result of one that was not."""

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import runs
from tre_lightning.callbacks.progress import RunProgress

# Epochs of 3 iterations, of which every one is saved; the best one lies within the run.
EPOCH, EPOCHS = 3, 3
ITERATIONS = EPOCH * EPOCHS
CHANGES = {
    "data.init_args.iterations_per_epoch": EPOCH,
    "trainer.max_epochs": EPOCHS,
    "checkpoint": {"keep_all": True, "monitor": "val/finished_fraction"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption; tests only read it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    runs.run(run_dir, changes=CHANGES)
    return run_dir


def assert_same_run(left: Path, right: Path) -> None:
    assert runs.distance(runs.weights(left), runs.weights(right)) == 0.0
    assert runs.scalars(left) == runs.scalars(right)
    for name in ("last", "best"):
        a, b = runs.checkpoint(left, name), runs.checkpoint(right, name)
        for key in ("global_step", "epoch", "tre_lightning"):
            assert a[key] == b[key], (name, key)
        assert a["loops"]["fit_loop"] == b["loops"]["fit_loop"], name
    for callback in ("IterationCheckpoint", "RunSummary"):
        a, b = (dict(runs.checkpoint(d)["callbacks"][callback]) for d in (left, right))
        assert {**a, "seconds": 0} == {**b, "seconds": 0}, callback


def test_the_whole_run_is_worth_interrupting(whole: Path) -> None:
    scalars = runs.scalars(whole)
    assert [step for step, _ in scalars["rollout/score"]] == list(range(ITERATIONS))
    assert [step for step, _ in scalars["val/score"]] == [0, 2, 5, 8]
    assert len({value for _, value in scalars["val/score"]}) > 2
    scores = [value for _, value in scalars["val/finished_fraction"][1:]]
    assert runs.saved_iteration(whole, "best") == EPOCH * (1 + scores.index(max(scores)))
    assert runs.saved_iteration(whole, "best") < ITERATIONS


@pytest.mark.parametrize("name", [*(f"iteration={i + 1}" for i in range(ITERATIONS)), "best"])
def test_from_every_checkpoint_of_a_finished_run(whole: Path, tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    runs.resume(run_dir, f"{run_dir}/checkpoints/{name}.ckpt", changes=CHANGES)
    assert_same_run(run_dir, whole)
    assert runs.texts(run_dir, "val/samples") == runs.texts(whole, "val/samples")


class Stop(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Make the n-th call of a callback hook during ``fit`` raise Stop, before anything is saved."""

    def stop(hook: str, number: int) -> None:
        calls = 0
        original = getattr(RunProgress, hook)

        def stopping(self: RunProgress, trainer: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal calls
            original(self, trainer, *args, **kwargs)
            calls += trainer.state.fn == "fit"
            if calls == number:
                monkeypatch.setattr(RunProgress, hook, original)
                raise Stop

        monkeypatch.setattr(RunProgress, hook, stopping)

    return stop


@pytest.mark.parametrize(
    ("hook", "number", "saved"),
    [
        ("on_train_batch_start", 2, 1),
        ("on_train_batch_start", 4, 3),  # between two epochs
        ("on_train_batch_end", 5, 4),
        ("on_train_batch_end", 6, 5),  # before the validation begins: the iteration is lost
        ("on_validation_batch_start", 4, 6),  # two batches a validation: in the second one
        ("on_validation_batch_end", 1, 3),
        ("on_validation_epoch_end", 1, 3),
        ("on_train_start", 1, None),
        ("on_train_end", 1, 9),
    ],
)
def test_stopped_anywhere(
    whole: Path,
    tmp_path: Path,
    stop_at: Callable[[str, int], None],
    hook: str,
    number: int,
    saved: int | None,
) -> None:
    run_dir = tmp_path / "run"
    stop_at(hook, number)
    with pytest.raises(Stop):
        runs.run(run_dir, changes=CHANGES)
    if saved is None:
        runs.run(run_dir, changes=CHANGES)  # nothing to protect: start again
    else:
        assert runs.saved_iteration(run_dir) == saved
        runs.resume(run_dir, changes=CHANGES)
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_stopped_between_validation_and_checkpoint(
    whole: Path, tmp_path: Path, stop_at: Callable[[str, int], None], hook: str
) -> None:
    """The validation is repeated: its scores are logged twice, but they are the same."""
    run_dir = tmp_path / "run"
    stop_at(hook, 2)
    with pytest.raises(Stop):
        runs.run(run_dir, changes=CHANGES)
    runs.resume(run_dir, changes=CHANGES)
    assert runs.distance(runs.weights(run_dir), runs.weights(whole)) == 0.0
    once, twice = runs.scalars(whole), runs.scalars(run_dir)
    assert {tag: sorted(set(events)) for tag, events in twice.items()} == {
        tag: sorted(set(events)) for tag, events in once.items()
    }
    assert [step for step, _ in twice["val/score"]] == [0, 2, 5, 5, 8]


def test_checkpoints_may_be_rarer_than_iterations(
    whole: Path, tmp_path: Path, stop_at: Callable[[str, int], None]
) -> None:
    run_dir = tmp_path / "run"
    changes = {
        **CHANGES,
        "checkpoint": {"every_n_iterations": 2, "monitor": "val/finished_fraction"},
    }
    stop_at("on_train_batch_start", 9)
    with pytest.raises(Stop):
        runs.run(run_dir, changes=changes)
    assert runs.saved_iteration(run_dir) == 8
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == [
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]
    runs.resume(run_dir, changes=changes)
    assert runs.distance(runs.weights(run_dir), runs.weights(whole)) == 0.0
    assert runs.scalars(run_dir) == runs.scalars(whole)


def test_epochs_without_validation(tmp_path: Path, stop_at: Callable[[str, int], None]) -> None:
    every_second = "--trainer.check_val_every_n_epoch=2"
    changes = {**CHANGES, "checkpoint": {"keep_all": True}}
    runs.run(tmp_path / "whole", every_second, changes=changes)
    stop_at("on_train_batch_start", EPOCH + 1)
    with pytest.raises(Stop):
        runs.run(tmp_path / "run", every_second, changes=changes)
    assert runs.saved_iteration(tmp_path / "run") == EPOCH
    runs.run(tmp_path / "run", every_second, "--ckpt_path=last", changes=changes)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert [step for step, _ in runs.scalars(tmp_path / "run")["val/score"]] == [0, 5]


def test_a_failing_update_loses_its_iteration_only(tmp_path: Path) -> None:
    term: dict[str, Any] = {"class_path": "runs.FailingBonus", "init_args": {"fail_at": None}}
    micro = {"model.ppo": {**runs.TINY["model"]["ppo"], "micro_batch_size": 16}}
    runs.run(tmp_path / "whole", changes={**micro, "trainer.callbacks": [term]})
    # In the second of the four updates of iteration 2.
    term["init_args"]["fail_at"] = 2 * runs.STEPS_AN_ITERATION + 2
    run_dir = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the update fails"):
        runs.run(run_dir, changes={**micro, "trainer.callbacks": [term]})
    assert runs.saved_iteration(run_dir) == 2
    assert not (run_dir / "model").exists()
    term["init_args"]["fail_at"] = None
    runs.resume(run_dir, changes={**micro, "trainer.callbacks": [term]})
    assert_same_run(run_dir, tmp_path / "whole")


# ----- a real process


@contextmanager
def process_held(
    run_dir: Path, batch: str, changes: dict[str, Any]
) -> Iterator[tuple[runs.Process, Path]]:
    """A process that scores a batch until the file that comes with it is deleted."""
    hold = run_dir.with_name("hold")
    words = runs.words(run_dir, changes=changes)
    with runs.process(words, HOLD=batch, HOLD_FILE=str(hold)) as process:
        runs.wait_until(hold.exists, process)
        yield process, hold


def test_killed(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with process_held(run_dir, "train:4", CHANGES) as (process, _):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert runs.saved_iteration(run_dir) == 4
    runs.resume(run_dir, changes=CHANGES)
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize("iteration", [2, 3])  # within an epoch, and the last one of it
def test_terminated_in_an_iteration(whole: Path, tmp_path: Path, iteration: int) -> None:
    run_dir = tmp_path / "run"
    with process_held(run_dir, f"train:{iteration - 1}", CHANGES) as (process, hold):
        process.send_signal(signal.SIGTERM)
        hold.unlink()
        printed, _ = process.communicate(timeout=30.0)
    assert process.returncode == 143, printed[-3000:]
    assert "Traceback" not in printed
    assert runs.saved_iteration(run_dir) == iteration  # finished and saved, and no further one
    runs.resume(run_dir, changes=CHANGES)
    assert_same_run(run_dir, whole)


def test_terminated_before_training(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with process_held(run_dir, "val:0", {}) as (process, hold):  # the first validation
        process.send_signal(signal.SIGTERM)
        hold.unlink()
        printed, _ = process.communicate(timeout=30.0)
    assert process.returncode == 143, printed[-3000:]
    assert not (run_dir / "checkpoints").exists()


def test_best_score_survives(whole: Path) -> None:
    best = runs.checkpoint(whole)["callbacks"]["IterationCheckpoint"]["best_score"]
    scores = [value for _, value in runs.scalars(whole)["val/finished_fraction"][1:]]
    assert math.isclose(best, max(scores), rel_tol=1e-6)
