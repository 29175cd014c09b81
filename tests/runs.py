"""A tiny run that several tests share: its configuration, how to start it, what it left behind."""

import copy
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from io import StringIO
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.cli import LightningCLI
from pytest import approx
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util
from torch import Tensor

from tre_lightning.batches import PromptBatch
from tre_lightning.cli import main as cli
from tre_lightning.cli.main import main
from tre_lightning.common.distributed import world
from tre_lightning.methods import EntropyBonus, PolicyOutputs, Tokens
from tre_lightning.tasks import CountdownDataModule

# The warm start of all these runs is trained once a session.
_cache = tempfile.TemporaryDirectory(prefix="tre_lightning_tests_")
WARM_STARTS = Path(_cache.name) / "warm_starts"

ROOT = Path(__file__).parents[1]  # of the repository
CONFIGS = ROOT / "configs"

ITERATIONS = 4  # PPO iterations of the tiny run
STEPS_AN_ITERATION = 4  # optimiser steps: num_epochs x num_minibatches
# Of weights that are equal but for rounding. Llama's norms compute in float32 where all else is
# float64, in the backward pass too: a sum of the gradients of rows that share a prompt rounds there
# otherwise than each of them.
ROUNDING = 1e-5
CLOCKS = ("rollout/seconds", "policy/update_seconds")  # all that equal runs may differ in

# A process numbers its event files, and TensorBoard reads those of one second in the order of their
# names: in a process of many runs the numbers must not change their width.
event_file_writer._global_uid._value = 1000


class PlusCountdown(CountdownDataModule):
    """Countdown prompts with a score that a nearly random policy reaches now and then.

    In the environment, HOLD names a batch (``train:4``) and HOLD_FILE a file: the scoring of that
    batch makes the file and goes on when it is gone.
    """

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """1 for a response with a plus sign, else 0."""
        if os.environ.get("HOLD") == f"{prompts.split}:{prompts.index}":
            file = Path(os.environ["HOLD_FILE"])
            file.touch()
            while file.exists():
                time.sleep(0.01)
        return torch.tensor([float("+" in response.split()) for response in responses])


class FailingBonus(EntropyBonus):
    """An entropy bonus that fails at one of its calls, of which each update makes one."""

    def __init__(self, coef: float = 0.01, fail_at: int | None = None) -> None:
        super().__init__(coef, name="failing")
        self.calls_left = fail_at

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise RuntimeError("the update fails")
        return super().per_token(outputs, tokens)


class NeedsLogits(EntropyBonus):
    """An entropy bonus that has the logits computed, and checks them."""

    needs_logits = True

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        assert outputs.logits is not None
        log_p = outputs.logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)


class Poison(EntropyBonus):
    """An entropy bonus that is not finite at some of its calls, of which each update makes one.

    ``kind``: its ``loss`` is NaN; or only the ``gradient`` that it gives; or the loss is an
    infinite ``constant``, without a gradient, on the last rank alone.
    """

    def __init__(self, kind: str = "loss", first: int = 0, last: int = 0) -> None:
        super().__init__(0.01, name="poison")
        self.kind, self.first, self.last, self.calls = kind, first, last, 0

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        loss = super().per_token(outputs, tokens)
        self.calls += 1
        if not self.first <= self.calls <= self.last:
            return loss
        if self.kind == "loss":
            return loss * math.nan
        if self.kind == "constant":
            rank, ranks = world()
            return torch.full_like(loss, math.inf) if rank == ranks - 1 else loss
        loss = loss * 1.0
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss


TRE = {
    "class_path": "tre_lightning.methods.TrustRegionEntropy",
    "init_args": {"top_p": 0.9, "coef": 0.01},
}
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = {
    "model": {
        "policy": {"architecture": ARCHITECTURE},
        "rollout": {"num_responses": 4, "max_new_tokens": 8},
        "evaluation": {"num_responses": 2, "num_samples_logged": 2},
        "ppo": {"num_epochs": 2, "num_minibatches": 2, "micro_batch_size": 8},
        "optim": {"lr": 0.01, "critic_lr": 0.01},
    },
    "data": {
        "class_path": "runs.PlusCountdown",
        "init_args": {
            "puzzles": {
                "count": [2, 3],
                "number_range": [1, 9],
                "target_range": [1, 30],
                "max_intermediate": 30,
            },
            "format": "steps",
            "instruct": False,
            "batch_size": 4,
            "iterations_per_epoch": 2,
            "val_size": 6,
            "test_size": 5,
            "eval_batch_size": 4,
        },
    },
    "warm_start": {"steps": 3, "batch_size": 8, "lr": 0.02, "cache_dir": str(WARM_STARTS)},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "callbacks": [TRE]},
}


def words(
    run_dir: Path, *flags: str, command: str = "fit", changes: Mapping[str, Any] | None = None
) -> list[str]:
    """A command line for the tiny configuration, whose file is written beside the run directory.

    ``changes`` are by dotted key; None drops the key.
    """
    config = copy.deepcopy(TINY)
    for dotted, value in (changes or {}).items():
        *groups, key = dotted.split(".")
        target = config
        for group in groups:
            target = target[group]
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    file = run_dir.with_name(run_dir.name + ".json")
    file.write_text(json.dumps(config))
    return [command, "--config", str(file), f"--trainer.default_root_dir={run_dir}", *flags]


def run(
    run_dir: Path, *flags: str, command: str = "fit", changes: Mapping[str, Any] | None = None
) -> LightningCLI:
    """Run a command on the tiny configuration in this process."""
    return main(words(run_dir, *flags, command=command, changes=changes))


def resume(
    run_dir: Path, ckpt_path: str = "last", *, changes: Mapping[str, Any] | None = None
) -> LightningCLI:
    """Go on with a run from a checkpoint."""
    # TensorBoard reads event files by the seconds, then the processes and numbers, in their names.
    newest = max(file.name.split(".") for file in run_dir.glob("events.out.tfevents.*"))
    while newest[-2] != str(os.getpid()) and int(time.time()) <= int(newest[3]):
        time.sleep(0.01)
    return run(run_dir, f"--ckpt_path={ckpt_path}", changes=changes)


def write_jsonl(file: Path, rows: Sequence[Any]) -> str:
    """A file of these rows; returns its name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def output_of(*args: Any, **options: Any) -> str:
    """What :func:`run` prints."""
    with redirect_stdout(StringIO()) as out:
        run(*args, **options)
    return out.getvalue()


def forked(call: Callable[[], object]) -> BaseProcess:
    """Call in a process of its own, without the seconds of its imports."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


class Fork:
    """A call in a fork of this process, with what the tests use of ``Popen``.

    ``extra`` goes into its environment, and what it prints into ``output``.
    """

    def __init__(
        self, call: Callable[[], object], extra: Mapping[str, str], output: IO[Any] | None = None
    ) -> None:
        self._file = output or tempfile.TemporaryFile()  # noqa: SIM115 - until the end of this

        def run() -> None:
            os.setsid()
            os.environ.update(extra)
            for descriptor in (1, 2):
                os.dup2(self._file.fileno(), descriptor)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            call()

        self._process = forked(run)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """How it ended; None = it goes on."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.poll()

    @property
    def stdout(self) -> StringIO:
        """What it has printed so far."""
        length = os.fstat(self._file.fileno()).st_size
        return StringIO(os.pread(self._file.fileno(), length, 0).decode())

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(sys.argv, timeout or 0.0, self.stdout.read())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed until its end."""
        self.wait(timeout)
        return self.stdout.read(), None


Process = subprocess.Popen[str] | Fork
Said = Callable[..., str]  # the fixtures refusal and shown


def python_path() -> str:
    """PYTHONPATH of a fresh interpreter that imports what this one can, the tests' helpers too."""
    return os.pathsep.join(sys.path)


@contextmanager
def process(arguments: Sequence[str], *, fresh: bool = False, **extra: str) -> Iterator[Process]:
    """``python -m tre_lightning`` as a process of its own, which does not outlive the block.

    It is a fork of this one, unless it must be a ``fresh`` interpreter: Lightning starts the
    other ranks as it was started itself. ``extra`` goes into its environment.
    """
    child: Process
    if fresh:
        child = subprocess.Popen(
            [sys.executable, "-m", "tre_lightning", *arguments],
            env={**os.environ, "PYTHONPATH": python_path(), **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    else:
        child = Fork(lambda: _command(arguments), extra)
    with ending(child):
        yield child


@contextmanager
def ending(child: Process) -> Iterator[Process]:
    """The process does not outlive the block, nor do its own children."""
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.wait()


def _command(arguments: Sequence[str]) -> None:
    sys.argv = [str(Path(cli.__file__).with_name("__main__.py")), *arguments]
    cli.run()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ranks(
    call: Callable[[int], object], count: int = 2, timeout: float = 240.0
) -> tuple[list[int], str]:
    """Call, with the rank, in processes of one run as torchrun starts them.

    Returns:
        Exit codes by rank, and what they printed, the first one first.
    """
    everyone = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    end = time.monotonic() + timeout
    with ExitStack() as stack:
        forks = [
            stack.enter_context(
                ending(Fork(partial(call, r), {**everyone, "RANK": str(r), "LOCAL_RANK": str(r)}))
            )
            for r in range(count)
        ]
        printed = [fork.communicate(max(0.0, end - time.monotonic()))[0] for fork in forks]
        return [fork.wait() for fork in forks], "".join(printed)


def command_on_ranks(arguments: Sequence[str]) -> tuple[list[int], str]:
    """``python -m tre_lightning`` on two devices, in the processes of :func:`ranks`."""
    return ranks(lambda rank: _command(arguments))


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    """A checkpoint of a run."""
    file = run_dir / "checkpoints" / f"{name}.ckpt"
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


def saved_iteration(run_dir: Path, name: str = "last") -> int:
    """The number of PPO iterations in a checkpoint."""
    return int(checkpoint(run_dir, name)["tre_lightning"]["iteration"])


def weights(run_dir: Path, name: str = "last") -> dict[str, Tensor]:
    """Weights of policy and critic in a checkpoint of a run."""
    return dict(checkpoint(run_dir, name)["state_dict"])


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest difference of any weight; 0 = the same bit for bit (but for the sign of a zero)."""
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every logged scalar by tag, without the clocks and NaN."""
    events = event_accumulator.EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in CLOCKS]
    numbers = {tag: [e for e in events.Scalars(tag) if e.value == e.value] for tag in tags}
    return {tag: [(e.step, e.value) for e in found] for tag, found in numbers.items()}


def texts(run_dir: Path, tag: str) -> list[tuple[int, str]]:
    """(step, text) of a text tag."""
    events = plugin_event_accumulator.EventAccumulator(str(run_dir), {"tensors": 0}).Reload()
    return [
        (e.step, tensor_util.make_ndarray(e.tensor_proto).item().decode())
        for e in events.Tensors(f"{tag}/text_summary")
    ]


def assert_same_run(left: Path, right: Path) -> None:
    """The same weights, and every iteration once; a validation may have been repeated."""
    assert distance(weights(left), weights(right)) == 0.0
    a, b = scalars(left), scalars(right)
    assert a.keys() == b.keys()
    for tag, events in a.items():
        if tag == "epoch" or tag.startswith("val/"):
            assert sorted(set(events)) == sorted(set(b[tag])), tag
        else:
            assert events == b[tag], tag


def wait_until(condition: Callable[[], object], process: Any = None, seconds: float = 180) -> None:
    """Come back when the condition holds; a test whose process ends first or hangs fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.01)


def exit_code(process: BaseProcess, seconds: float = 180.0) -> int | None:
    """How a process ended; one that hangs is killed and has None."""
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def assert_close_curves(left: Path, right: Path, rel: float = 1e-5, abs: float = 1e-6) -> None:
    """The same tags and steps, and values that differ by rounding alone, but for padding."""
    a, b = scalars(left), scalars(right)
    assert a.keys() == b.keys()
    for tag, events in a.items():
        if tag.endswith("padding_fraction"):
            continue
        close = [(step, approx(value, rel=rel, abs=abs)) for step, value in events]
        assert b[tag] == close, tag


def is_running(pid: int) -> bool:
    """Whether there is such a process; of an orphan that has ended nobody may collect the rest."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
