"""What may go wrong in a run: numbers that are not finite, damaged files, a full disk, kills."""

import errno
import math
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
import tre_lightning.sampling.in_process
import tre_lightning.training.objective
from tre_lightning.batches import PromptBatch
from tre_lightning.callbacks import checkpoint
from tre_lightning.callbacks.checkpoint import IterationCheckpoint, find_checkpoint
from tre_lightning.callbacks.progress import RunProgress
from tre_lightning.common.distributed import world
from tre_lightning.common.errors import CheckpointError
from tre_lightning.training.nonfinite import nan_gradient_if_nonfinite
from tre_lightning.training.options import PPOArgs


class InfiniteScore(runs.PlusCountdown):
    """Scores one response of the second batch with infinity."""

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        scores = super().score(responses, prompts)
        if (prompts.split, prompts.index) == ("train", 1):
            scores[2] = -math.inf
        return scores


def poisoned(kind: str = "loss", first: int = 0, last: int = 0, **ppo: int) -> dict[str, Any]:
    """Changes of the tiny run."""
    spec = {"class_path": "runs.Poison", "init_args": {"kind": kind, "first": first, "last": last}}
    return {
        "trainer.callbacks": [spec],
        "model.ppo": {**runs.TINY["model"]["ppo"], **ppo},
        "checkpoint": {"keep_all": True},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a fault; tests only read it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    runs.run(run_dir, changes=poisoned())
    return run_dir


# ----- losses, gradients and scores that are not finite


@pytest.mark.parametrize("value", [2.0, math.inf, -math.inf, math.nan])
def test_the_gradient_tells_of_the_loss(value: float) -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    # Added without a gradient of its own, as an infinity at a token that does not count.
    nan_gradient_if_nonfinite(3.0 * weight + value).backward()
    assert weight.grad is not None
    assert weight.grad.item() == 3.0 if value == 2.0 else weight.grad.isnan()


@pytest.mark.parametrize("kind", ["loss", "gradient", "constant"])
def test_a_skipped_update_changes_nothing(kind: str, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = runs.STEPS_AN_ITERATION + 1  # all of the second iteration, and one of the third
    runs.run(run_dir, changes=poisoned(kind, first, first + runs.STEPS_AN_ITERATION))
    before, after, last = (
        runs.checkpoint(run_dir, name) for name in ("iteration=1", "iteration=2", "last")
    )
    assert runs.distance(before["state_dict"], runs.weights(whole, "iteration=1")) == 0.0
    assert runs.distance(before["state_dict"], after["state_dict"]) == 0.0
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (before, after)]
    for index, state in states[0].items():
        assert runs.distance(state, states[1][index]) == 0.0, index
    assert after["tre_lightning"]["skipped_in_a_row"] == 4
    assert last["tre_lightning"]["skipped_in_a_row"] == 0
    assert runs.distance(last["state_dict"], before["state_dict"]) > 1e-3
    assert all(bool(weight.isfinite().all()) for weight in last["state_dict"].values())
    scalars = runs.scalars(run_dir)
    assert scalars["policy/skipped_updates"] == [(0, 0.0), (1, 4.0), (2, 1.0), (3, 0.0)]
    for tag in ("loss/total", "loss/poison", "policy/grad_norm"):
        assert [step for step, _ in scalars[tag]] == [0, 2, 3], tag  # NaN is left out
        assert all(math.isfinite(value) for _, value in scalars[tag]), tag


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("loss", "not finite: loss/poison;"),
        ("gradient", "not finite: gradient of the policy;"),
        ("value", "not finite: loss/value;"),
    ],
)
def test_too_many_skipped_updates_end_the_run(
    kind: str,
    named: str,
    whole: Path,
    tmp_path: Path,
    refusal: runs.Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    changes = poisoned(kind, 6, 100, max_skipped_updates=3)
    if kind == "value":
        changes = poisoned(max_skipped_updates=3)
        calls = 0
        value_loss = tre_lightning.training.objective.value_loss

        def failing(values: Tensor, *args: Tensor, **options: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return value_loss(values, *args, **options) * (math.nan if calls >= 6 else 1.0)

        monkeypatch.setattr(tre_lightning.training.objective, "value_loss", failing)
    line = refusal(runs.run, run_dir, changes=changes, code=1)
    said = "3 updates in a row", "max_skipped_updates", named, "model.optim.lr", "--ckpt_path last"
    for word in said:
        assert word in line, line
    assert runs.saved_iteration(run_dir) == 1
    if kind == "loss":
        runs.resume(run_dir, changes=poisoned())
        runs.assert_same_run(run_dir, whole)


def test_skipped_updates_in_a_row_are_counted_over_a_resume(
    tmp_path: Path, refusal: runs.Said
) -> None:
    run_dir = tmp_path / "run"
    runs.run(run_dir, changes=poisoned("loss", 7, 8, max_skipped_updates=3))
    (run_dir / "checkpoints" / "iteration=2.ckpt").rename(run_dir / "checkpoints" / "last.ckpt")
    assert runs.checkpoint(run_dir)["tre_lightning"]["skipped_in_a_row"] == 2
    changes = poisoned("loss", 1, 1, max_skipped_updates=3)
    line = refusal(runs.resume, run_dir, changes=changes, code=1)
    assert "3 updates in a row" in line


def test_a_run_must_allow_for_one_update() -> None:
    with pytest.raises(ValueError, match=r"ppo\.max_skipped_updates=0 must be at least 1"):
        PPOArgs(max_skipped_updates=0)


def test_an_infinite_score_is_named(tmp_path: Path, refusal: runs.Said) -> None:
    changes = {"data.class_path": "test_faults.InfiniteScore"}
    line = refusal(runs.run, tmp_path / "run", changes=changes, code=1)
    for word in ("the scorer gave -inf to the response '", "or NaN", "--ckpt_path last"):
        assert word in line, line
    assert runs.saved_iteration(tmp_path / "run") == 1


# ----- checkpoints


class FakeTrainer(SimpleNamespace):
    """Saves the number of its saves."""

    is_global_zero = True
    saves = 0

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        path.parent.mkdir(exist_ok=True)
        self.saves += 1
        run = {"iteration": self.saves, "shapes": {}}
        torch.save({"tre_lightning": run, "global_step": self.saves}, path)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[], None]:
    """Write the next ``last.ckpt``."""
    trainer, callback = FakeTrainer(default_root_dir=tmp_path), IterationCheckpoint()
    return lambda: callback._save(trainer, ["last.ckpt"])  # type: ignore[arg-type]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def no_links(*args: Any) -> None:
    raise OSError(errno.EPERM, "no hard links here")


@pytest.mark.parametrize("links", [True, False])
def test_there_is_always_a_good_checkpoint(
    links: bool, save: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()
    assert names(tmp_path) == ["last.ckpt"]
    original, moments = Path.replace, 0

    def looking(self: Path, target: Path) -> None:
        nonlocal moments
        found = [find_checkpoint("last", tmp_path)]
        original(self, target)
        found.append(find_checkpoint("last", tmp_path))
        assert links is False or {path.name for path in found} == {"last.ckpt"}
        moments += 1

    monkeypatch.setattr(Path, "replace", looking)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for saves in (2, 3):
        save()
        assert runs.saved_iteration(tmp_path) == saves
        assert runs.saved_iteration(tmp_path, "previous") == saves - 1
        assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert moments == 4


def test_one_file_has_all_the_names_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, callback = FakeTrainer(default_root_dir=tmp_path), IterationCheckpoint()
    folder = tmp_path / "checkpoints"
    callback._save(trainer, ["last.ckpt", "best.ckpt", "iteration=1.ckpt"])  # type: ignore[arg-type]
    assert names(tmp_path) == ["best.ckpt", "iteration=1.ckpt", "last.ckpt"]
    assert len({path.stat().st_ino for path in folder.iterdir()}) == 1
    callback._save(trainer, ["last.ckpt"])  # type: ignore[arg-type]
    assert runs.saved_iteration(tmp_path, "best") == 1  # it stays when the last one goes on
    monkeypatch.setattr(os, "link", no_links)
    callback._save(trainer, ["last.ckpt", "best.ckpt"])  # type: ignore[arg-type]
    assert runs.saved_iteration(tmp_path, "best") == runs.saved_iteration(tmp_path) == 3
    assert not [path for path in folder.iterdir() if path.suffix == ".partial"]


def saves(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> list[tuple[int, Sequence[str]]]:
    """The iteration and the names of every save of the tiny run, taken for one of a large model."""
    made = []
    original = IterationCheckpoint._save

    def noted(self: IterationCheckpoint, trainer: Any, names: Sequence[str]) -> None:
        made.append((trainer.lightning_module.iteration, names))
        original(self, trainer, names)

    monkeypatch.setattr(IterationCheckpoint, "_save", noted)
    monkeypatch.setattr(checkpoint, "_LARGE", 0)
    runs.run(run_dir, *flags)
    return made


def test_a_large_model_is_saved_when_it_is_better_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saves(tmp_path / "run", monkeypatch)
    others = [iteration for iteration, names in made if "best.ckpt" not in names]
    assert set(others) <= {runs.ITERATIONS} and made[-1][0] == runs.ITERATIONS
    assert any("best.ckpt" in names for _, names in made)
    assert "previous.ckpt" not in names(tmp_path / "run")


@pytest.mark.parametrize(
    "flag", ["--checkpoint.every_n_minutes=0", "--checkpoint.every_n_iterations=1"]
)
def test_a_large_model_is_saved_as_often_as_is_said(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saves(tmp_path / "run", monkeypatch, flag)
    # The last iteration of an epoch before its validation, and after it.
    assert [iteration for iteration, _ in made] == [1, 2, 2, 3, 4, 4]


def test_no_more_is_lost_than_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of iterations that take 50 s each, and one that takes 400 s."""
    now = 0.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(checkpoint, "_LARGE", 0)
    progress = SimpleNamespace(current=SimpleNamespace(ready=1))
    trainer: Any = FakeTrainer(
        received_sigterm=False,
        should_stop=False,
        is_last_batch=False,
        max_epochs=9,
        max_steps=-1,
        global_step=0,
        fit_loop=SimpleNamespace(epoch_progress=progress),
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    module: Any = SimpleNamespace(iteration=0, parameters=lambda: [torch.zeros(1)])
    callback = IterationCheckpoint(every_n_minutes=2.0)
    saved = []
    monkeypatch.setattr(callback, "_save", lambda trainer, names: saved.append(now))
    callback.on_train_start(trainer, module)
    for seconds in (50.0, 50.0, 50.0, 50.0, 400.0, 50.0, 50.0):
        now += seconds
        module.iteration += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert saved == [100.0, 200.0, 600.0, 700.0]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def clear(file: Path) -> None:
    file.write_bytes(b"")


def scribble(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


@pytest.mark.parametrize("spoil", [truncate, clear, scribble, Path.unlink])
def test_a_spoilt_last_checkpoint_gives_way_to_the_one_before(
    spoil: Callable[[Path], None],
    save: Callable[[], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save()
    save()
    assert find_checkpoint("last", tmp_path).name == "last.ckpt"
    assert capsys.readouterr().err == ""
    spoil(tmp_path / "checkpoints" / "last.ckpt")
    assert find_checkpoint("last", tmp_path).name == "previous.ckpt"
    line = capsys.readouterr().err
    assert line.startswith("warning: ") and line.count("\n") == 1
    assert "previous.ckpt (iteration 1)" in line


def test_a_damaged_checkpoint_does_not_replace_the_good_one(tmp_path: Path) -> None:
    for iteration in (1, 2):
        trainer = FakeTrainer(default_root_dir=tmp_path, saves=iteration - 1)
        callback = IterationCheckpoint()
        callback._save(trainer, ["last.ckpt"])  # type: ignore[arg-type]
    truncate(tmp_path / "checkpoints" / "last.ckpt")
    trainer = FakeTrainer(default_root_dir=tmp_path, saves=2)
    callback = IterationCheckpoint()  # of the resumed run
    callback._save(trainer, ["last.ckpt"])  # type: ignore[arg-type]
    assert runs.saved_iteration(tmp_path) == 3
    assert runs.saved_iteration(tmp_path, "previous") == 1
    callback._save(trainer, ["last.ckpt"])  # type: ignore[arg-type]
    assert runs.saved_iteration(tmp_path, "previous") == 3


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: runs.Said
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "iteration=2.ckpt").replace(checkpoints / "previous.ckpt")
    truncate(checkpoints / "last.ckpt")
    runs.resume(run_dir, changes=poisoned())
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(lines) == 1 and "last.ckpt is damaged" in lines[0] and "iteration 2" in lines[0]
    runs.assert_same_run(run_dir, whole)

    for name in ("last", "previous"):
        truncate(checkpoints / f"{name}.ckpt")
    line = refusal(runs.resume, run_dir, changes=poisoned())
    assert line.startswith("error: ckpt_path=last: neither") and "give best" in line


def test_a_full_disk_leaves_no_half_file(save: Callable[[], None], tmp_path: Path) -> None:
    save()
    partial = tmp_path / "checkpoints" / "last.partial"

    def full(self: Any, path: Path, weights_only: bool) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTrainer, "save_checkpoint", full)
        with pytest.raises(CheckpointError, match=r"last\.ckpt could not be .* No space left"):
            save()
    assert not partial.exists() and names(tmp_path) == ["last.ckpt"]
    assert runs.saved_iteration(tmp_path) == 1


def test_a_run_on_a_full_disk_can_go_on(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    smallest = min(file.stat().st_size for file in (whole / "checkpoints").iterdir())

    def filling() -> None:
        tempfile.tempdir = str(temporary)
        original = RunProgress.on_train_batch_start

        def full(self: RunProgress, trainer: Any, module: Any, *args: Any) -> None:
            original(self, trainer, module, *args)
            if module.iteration == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, smallest // 2))

        RunProgress.on_train_batch_start = full  # type: ignore[method-assign]
        runs.run(run_dir, changes=poisoned())

    assert runs.exit_code(runs.forked(filling)) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in ("last.ckpt could not be written", "is intact", "make room", "--ckpt_path last"):
        assert word in lines[0], lines[0]
    assert not list((run_dir / "checkpoints").glob("*.partial")) and not list(temporary.iterdir())
    assert runs.saved_iteration(run_dir) == 2
    runs.resume(run_dir, changes=poisoned())
    runs.assert_same_run(run_dir, whole)


# ----- killed processes


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: Any, name: str, number: int, *, before: bool) -> None:
    """Be killed before or after the n-th call of a function."""
    original, calls = getattr(owner, name), 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == number:
            die()
        result = original(*args, **options)
        if calls == number:
            die()
        return result

    setattr(owner, name, dying)


def die_writing(number: int) -> None:
    """Be killed when half of the n-th checkpoint is written to where it belongs."""
    original, calls = shutil.move, 0

    def dying(source: str, target: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            data = Path(source).read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])
            die()
        return original(source, target)

    shutil.move = dying  # type: ignore[assignment]


def moments(draw: random.Random) -> Iterator[Callable[[], None]]:
    """Random moments of a tiny run at which to die: of the rollout, the update, the checkpoint."""
    before = draw.random() < 0.5
    rollout, update = draw.randint(1, 40), draw.randint(1, 12)
    yield lambda: die_at(tre_lightning.sampling.in_process, "pick_tokens", rollout, before=before)
    yield lambda: die_at(tre_lightning.training.objective, "policy_loss", update, before=before)
    save, place = draw.randint(1, 4), draw.randrange(4)
    functions = [(os, "link"), (Path, "replace"), (torch, "save")]
    if place == len(functions):
        yield lambda: die_writing(save)
    else:
        yield lambda: die_at(*functions[place], save, before=before)


def go_on(run_dir: Path) -> None:
    if (run_dir / "checkpoints" / "last.ckpt").exists():
        runs.resume(run_dir, changes=poisoned())
    else:
        second = int(time.time())  # TensorBoard reads files in the order of their seconds
        while run_dir.exists() and int(time.time()) == second:
            time.sleep(0.01)
        runs.run(run_dir, changes=poisoned())  # nothing to protect: start again


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment(seed: int, whole: Path, tmp_path: Path) -> None:
    run_dir, draw = tmp_path / "run", random.Random(seed)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    moment = list(moments(draw))[seed % 3]

    def killed() -> None:
        tempfile.tempdir = str(temporary)
        moment()
        go_on(run_dir)

    assert runs.exit_code(runs.forked(killed)) == -signal.SIGKILL
    go_on(run_dir)
    runs.assert_same_run(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_time(seed: int, whole: Path, tmp_path: Path) -> None:
    run_dir, draw = tmp_path / "run", random.Random(seed)
    for _ in range(2):
        process = runs.forked(lambda: go_on(run_dir))
        time.sleep(draw.uniform(0.0, 2.5))
        process.kill()
        assert runs.exit_code(process) in (-signal.SIGKILL, 0)
    go_on(run_dir)
    runs.assert_same_run(run_dir, whole)


# ----- several processes


def ranks(
    run_dir: Path, changes: dict[str, Any], prepare: Callable[[int], None]
) -> tuple[list[int], str]:
    """Exit codes of two processes of one run, and what they print."""
    flags = ("--trainer.strategy=ddp", "--trainer.devices=2")

    def start(rank: int) -> None:
        prepare(rank)
        runs.run(run_dir, *flags, changes=changes)

    return runs.ranks(start)


distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


@distributed
def test_all_ranks_skip_what_one_of_them_sees(whole: Path, tmp_path: Path) -> None:
    changes = poisoned("constant", 2 * runs.STEPS_AN_ITERATION + 1, 100, max_skipped_updates=5)
    codes, printed = ranks(tmp_path / "run", changes, lambda rank: None)
    assert codes == [1, 0]  # the first one speaks for both
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "5 updates in a row" in lines[0], lines
    assert "not finite: loss/poison;" in lines[0]
    assert runs.saved_iteration(tmp_path / "run") == 3
    left, right = (runs.weights(tmp_path / "run", f"iteration={i}") for i in (2, 3))
    assert runs.distance(left, right) == 0.0


class InfiniteOnLastRank(InfiniteScore):
    """The infinite score on the last rank alone; ``bug``: an error of another kind instead."""

    bug = False

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        rank, ranks = world()
        kind = InfiniteScore if rank == ranks - 1 else runs.PlusCountdown
        scores = kind.score(self, responses, prompts)
        if self.bug and scores.isinf().any():
            raise KeyError("no such answer")
        return scores


class BugOnLastRank(InfiniteOnLastRank):
    bug = True


@distributed
@pytest.mark.parametrize(
    ("kind", "said", "codes"),
    [
        ("InfiniteOnLastRank", "error: the scorer gave -inf to the response '", [1, 0]),
        ("BugOnLastRank", "error: process 1 of 2 failed: KeyError: 'no such answer'", [1, 1]),
    ],
)
def test_a_scorer_that_fails_on_one_rank_ends_all(
    kind: str, said: str, codes: list[int], whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = {**poisoned(), "data.class_path": f"test_faults.{kind}"}
    ended, printed = ranks(run_dir, changes, lambda rank: None)
    assert ended == codes
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(said), printed
    assert "--ckpt_path last" in lines[0]
    assert ("Traceback" in printed) == (codes[1] == 1)  # of the bug itself
    assert runs.saved_iteration(run_dir) == 1


@distributed
def test_a_full_disk_of_the_first_rank_ends_all(whole: Path, tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        original, saves = torch.save, 0

        def full(content: Any, target: Any, **options: Any) -> None:
            nonlocal saves
            # Not of the callbacks' states alone, which are tried before.
            saves += isinstance(content, dict) and "state_dict" in content
            if saves == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(content, target, **options)

        torch.save = full  # the first rank alone writes

    codes, printed = ranks(tmp_path / "run", poisoned(), prepare)
    assert codes == [1, 0]
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "could not be written" in lines[0], printed
    assert "No space left" in lines[0] and "Traceback" not in printed


@distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others(victim: int, whole: Path, tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        if rank == victim:
            die_at(tre_lightning.training.objective, "policy_loss", 6, before=True)

    codes, _ = ranks(tmp_path / "run", poisoned(), prepare)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, None)
    assert runs.saved_iteration(tmp_path / "run") == 1


@distributed
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_rank_of_lightnings_launcher_dies(victim: str, whole: Path, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    flags = ("--trainer.strategy=ddp", "--trainer.devices=2")
    words = runs.words(tmp_path / "run", *flags, changes=poisoned())
    with runs.process(words, fresh=True, HOLD="train:2", HOLD_FILE=str(hold)) as process:
        runs.wait_until(hold.exists, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = {"first": process.pid, "second": int(children[0])}
        os.kill(pids[victim], signal.SIGKILL)
        hold.unlink(missing_ok=True)

        def over() -> bool:
            process.poll()
            return not any(map(runs.is_running, pids.values()))

        runs.wait_until(over)
    assert runs.saved_iteration(tmp_path / "run") == 2
