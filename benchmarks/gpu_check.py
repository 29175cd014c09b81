"""What this package does on a GPU, in one command of at most 8 minutes, without a network.

    make gpu-check                                         # the same as
    python benchmarks/gpu_check.py --out runs/gpu_check    # on a CPU: small sizes, nothing judged

Parts, each in a process of its own:

* tests: the Triton kernels compiled for the card, against plain torch in float64.
* op: time and memory of the ops of benchmarks/entropy_op.py, M = 8,192 rows, V = 131,072 and
  151,936, D = 4,096, bfloat16, beside plain torch and Liger's fused linear cross-entropy with
  entropy. Where the card has not the memory for plain torch, there are fewer rows.
* update: benchmarks/ppo_step.py at 100M parameters under bfloat16, GRPO, beside trl.
* smollm2: 20 iterations of configs/smollm2.yaml under bfloat16.

A part is skipped with a reason where a package, a model or the hardware is missing. An error, or
the end of its time, ends a part as failed; the others go on, and the exit code is 1. Minutes that
a part does not use are those of the next. Writes ``gpu_check.json`` and ``gpu_check.md`` (the table
for docs/gpu.md), after every part anew, and what each part printed into ``PART.log``.

An aim is judged by its worst case of those measured. The least that the op can move from logits is
three passes over them (the forward pass reads, the backward pass reads and writes); a copy of the
same logits, timed beside, moves two, so the roofline's time is 1.5 of the copy's.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import entropy_op
import ppo_step
import torch

from tre_lightning.cli.main import main as tre_lightning
from tre_lightning.cli.model import PACKAGED, get_model
from tre_lightning.common.memory import peak_memory
from tre_lightning.ops import scan

ROOT = Path(__file__).parents[1]
MIB = 2**20
COPIES = 1.5  # of the logits, in the time of the roofline
PLAIN_BYTES = 48  # of GPU memory a logit that plain torch takes, inputs and gradients included
Fields = dict[str, Any]
Run = Callable[[str, argparse.Namespace, float], Fields]  # a part, for so many seconds


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    rows: int
    vocabularies: tuple[int, ...]
    width: int
    repetitions: int
    tests: tuple[str, ...]
    update: str
    iterations: int  # of the update that are timed
    smollm2: tuple[str, ...]


TESTS = "tests/ops/test_ops_triton.py"
SIZES = {
    "cuda": Sizes(
        rows=8192,
        vocabularies=(131_072, 151_936),
        width=4096,
        repetitions=10,
        tests=(TESTS,),
        update="100m",
        iterations=2,
        smollm2=("--data.init_args.iterations_per_epoch=20",),
    ),
    "cpu": Sizes(
        rows=32,
        vocabularies=(4096,),
        width=64,
        repetitions=2,
        tests=(TESTS, "-k", "not interpreter"),  # which takes minutes
        update="quick",
        iterations=1,
        smollm2=(
            "--data.init_args.iterations_per_epoch=2",
            "--data.init_args.batch_size=2",
            "--data.init_args.val_size=2",
            "--data.init_args.test_size=2",
            "--model.rollout.num_responses=2",
            "--model.rollout.max_new_tokens=6",
            "--model.ppo.num_minibatches=1",
        ),
    ),
}


class Skipped(Exception):
    """Why a part cannot run here."""


# ----- the parts


def run_tests(options: argparse.Namespace) -> Fields:
    """The kernels' tests, in a process of their own.

    Raises:
        Skipped: if every one of them is.
        RuntimeError: if one fails.
    """
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    if options.device == "cuda" and not scan._has_triton(torch.device("cuda")):
        raise Skipped("Triton is not installed, or the card is older than Ampere")
    hidden = {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        # Without the conftest.py of whole runs, whose imports take seconds.
        command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
        command += [*SIZES[options.device].tests, f"--junitxml={report}"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **hidden}, capture_output=True, text=True
        )
        print(done.stdout, done.stderr)
        if done.returncode != 0:
            said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
            raise RuntimeError(f"pytest ended with {done.returncode}: {' '.join(said[-1:])}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    if count == skipped:
        raise Skipped(f"all {count} tests were: they need a GPU and Triton")
    return {"passed": count - skipped, "skipped": skipped}


def run_op(options: argparse.Namespace) -> Fields:
    """The ops from logits and from hidden states."""
    sizes, device = SIZES[options.device], options.device
    logits, linear = [], []
    for vocabulary in sizes.vocabularies:
        count = sizes.rows
        if device == "cuda":
            count = min(count, torch.cuda.mem_get_info()[0] // (PLAIN_BYTES * vocabulary))
        common = (count, vocabulary, "bf16")
        row = entropy_op.time_logits(*common, "LLM-like", sizes.repetitions, device)
        row["of the roofline"] = {
            name: COPIES * row["copy_ms"] / (row["units"][f"ours {name}"] * row["read_ms"])
            for name in entropy_op.REGIONS
        }
        row["copy_gb_s"] = 2 * count * vocabulary * 2 / row["copy_ms"] / 1e6
        logits.append(row)
        release(device)
        linear.append(
            entropy_op.time_linear(
                *common,
                sizes.repetitions,
                width=sizes.width,
                region=entropy_op.REGIONS["full"],
                device=device,
                liger=True,
            )
        )
        release(device)
    return {"logits": logits, "linear": linear}


def release(device: str) -> None:
    """Give memory that is free back to the card."""
    if device == "cuda":
        torch.cuda.empty_cache()


def run_update(options: argparse.Namespace) -> Fields:
    """GRPO iterations, ours and trl's."""
    sizes = SIZES[options.device]
    asked = argparse.Namespace(
        size=sizes.update,
        lengths="even",
        prompts=None,
        prompt_tokens=None,
        new_tokens=None,
        device=options.device,
        threads=2,
        iterations=sizes.iterations,
        trl=None,
        trl_ppo=None,
    )
    rows = []
    missing = ppo_step.missing(ppo_step.GRPO, "trl", None)
    with tempfile.TemporaryDirectory() as directory:
        ppo_step.save_model(ppo_step.setting_of(asked), Path(directory))
        for who in ("ours", "trl")[: 1 if missing else 2]:
            found = ppo_step.run_apart(asked, ppo_step.GRPO, who, directory)
            rows.append(ppo_step.medians(ppo_step.GRPO, who, [found]))
    return {"size": sizes.update, "rows": rows, "no trl": missing}


def run_smollm2(options: argparse.Namespace) -> Fields:
    """Iterations of a real language model.

    Raises:
        Skipped: if there is none.
    """
    model = smollm2(options.model, options.out / "smollm2")
    with tempfile.TemporaryDirectory() as directory:
        command = ["fit", f"--config={ROOT / 'configs' / 'smollm2.yaml'}"]
        command += [f"--config={ROOT / 'configs' / 'memory' / 'bf16.yaml'}"]
        command += [f"--model.policy.model={model}", f"--trainer.default_root_dir={directory}/run"]
        command += [f"--trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}"]
        command += ["--trainer.devices=1", "--trainer.max_epochs=1"]
        trainer = tre_lightning([*command, *SIZES[options.device].smollm2]).trainer
    wanted = ("rollout/seconds", "policy/update_seconds", "rollout/score_mean", "val/pass@1")
    logged = {tag: float(v) for tag, v in trainer.callback_metrics.items() if tag in wanted}
    peak = peak_memory() / MIB
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / MIB
    return {"iterations": trainer.fit_loop.total_batch_idx + 1, "last": logged, "peak_mib": peak}


def smollm2(directory: Path, made: Path) -> Path:
    """The model; that of an installed package is written into the second directory.

    Raises:
        Skipped: if there is none.
    """
    if directory.is_dir():
        return directory
    packaged = PACKAGED["smollm2"]
    package, file = packaged.file.split("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise Skipped(
            f"there is no model in {directory}; with a network: "
            f"python -m tre_lightning model smollm2 --out {directory}"
        )
    try:
        return get_model(str(Path(found.origin).parent / file), str(made))
    except ValueError as error:
        raise Skipped(str(error)) from error


# What runs, and its share of the time.
PARTS: dict[str, Callable[[argparse.Namespace], Fields]] = {
    "tests": run_tests,
    "op": run_op,
    "update": run_update,
    "smollm2": run_smollm2,
}
SHARES = {"tests": 4, "op": 4, "update": 5, "smollm2": 3}


# ----- one part after the other


def run_part(name: str, options: argparse.Namespace, limit: float = 0.0) -> Fields:
    """Run a part here, without a limit; what became of it."""
    started = time.perf_counter()
    try:
        outcome: Fields = {"status": "passed", "results": PARTS[name](options)}
    except Skipped as reason:
        outcome = {"status": "skipped", "reason": str(reason)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        outcome = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {**outcome, "seconds": time.perf_counter() - started}


def run_apart(name: str, options: argparse.Namespace, limit: float) -> Fields:
    """Run a part in a fresh process, for at most so many seconds, and end all that it started."""
    result, log = options.out / f"{name}.part.json", options.out / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", str(options.out)]
    command += ["--device", options.device, "--model", str(options.model)]
    started, failed = time.perf_counter(), None
    with log.open("w") as said:
        child = subprocess.Popen(
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(limit)
            if not result.exists():
                failed = f"the process ended with {code}; {log}"
        except subprocess.TimeoutExpired:
            failed = f"it took longer than its {limit:.0f} s; {log}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = time.perf_counter() - started
    if failed is not None:
        return {"status": "failed", "reason": failed, "seconds": seconds}
    outcome: Fields = json.loads(result.read_text())
    result.unlink()
    return {**outcome, "seconds": seconds}


def check(options: argparse.Namespace, run: Run) -> Fields:
    """Run all parts; writes the two files after each."""
    machine = ppo_step.machine(argparse.Namespace(device=options.device, threads=2))
    report: Fields = {"device": options.device, "machine": machine, "parts": {}, "aims": []}
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    for name in PARTS:
        to_come = sum(SHARES[other] for other in PARTS if other not in report["parts"])
        limit = max(ends - time.monotonic(), 1.0) * SHARES[name] / to_come
        outcome = report["parts"][name] = run(name, options, limit)
        print(f"{name:<8} {outcome['status']} in {outcome['seconds']:.0f} s", end="")
        print(f": {outcome['reason']}" if "reason" in outcome else "", flush=True)
        report["aims"] = aims(options.device, report["parts"])
        (options.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu_check.md").write_text(markdown(report))
    return report


# ----- what is aimed at


def of_liger(op: Fields) -> float | str:
    """Time of the full entropy by Liger's, from hidden states: both return a tuple."""
    reason = next((row["no Liger"] for row in op["linear"] if row["no Liger"]), None)
    if reason is not None:
        return str(reason)
    shares = [row["of the head"] for row in op["linear"]]
    return max(share["fused"] / share["Liger"] for share in shares)


def of_full(op: Fields) -> float | str:
    """Time of TRE by that of the full entropy, from logits."""
    units = [row["units"] for row in op["logits"]]
    return max(u[f"ours {name}"] / u["ours full"] for u in units for name in ("TRE-K", "TRE-P"))


def of_roofline(op: Fields) -> float | str:
    """Share of the roofline, from logits."""
    return float(min(min(row["of the roofline"].values()) for row in op["logits"]))


def of_trl(update: Fields) -> float | str:
    """Time of trl's update by ours."""
    if update["no trl"]:
        return str(update["no trl"])
    ours, trl = (row["update, s"] for row in update["rows"])
    return float(trl / ours)


@dataclass(frozen=True)
class Aim:
    """A number that is to be reached."""

    what: str
    part: str
    measure: Callable[[Fields], float | str]  # or why it was not measured
    limit: float
    at_most: bool


AIMS = (
    Aim("time of the full entropy, in Liger's", "op", of_liger, 1.3, at_most=True),
    Aim("time of TRE, in our full entropy's", "op", of_full, 1.15, at_most=True),
    Aim("the op's share of the memory roofline", "op", of_roofline, 0.6, at_most=False),
    Aim("time of trl's update, in ours", "update", of_trl, 1.5, at_most=False),
)


def aims(device: str, parts: Mapping[str, Fields]) -> list[Fields]:
    """Whether each aim is reached, with a line that says so; None = it was not measured."""
    judged = []
    for aim in AIMS:
        part = parts.get(aim.part, {"status": "missing", "reason": "the part has not run"})
        if device == "cpu":
            found: float | str = "the aims are those of a GPU"
        elif part["status"] != "passed":
            found = part["reason"]
        else:
            found = aim.measure(part["results"])
        bound = f"{aim.what}: at most {aim.limit:g}" if aim.at_most else ""
        bound = bound or f"{aim.what}: at least {aim.limit:g}"
        if isinstance(found, str):
            reached, line = None, f"not measured: {bound} ({found})"
        else:
            reached = found <= aim.limit if aim.at_most else found >= aim.limit
            line = f"{'reached' if reached else 'missed'}: {bound}, measured {found:.2f}"
        value = None if isinstance(found, str) else found
        judged.append({"aim": bound, "value": value, "reached": reached, "line": line})
    return judged


# ----- the table


def markdown(report: Fields) -> str:
    """The page's table, and the aims under it."""
    machine = report["machine"]
    lines = [
        f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; medians; load before: {machine['load']:.1f}.",
        "",
        "| part | what | value |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(cells)} |" for cells in table(report["parts"])),
        "",
        *(f"- {aim['line']}" for aim in report["aims"]),
    ]
    return "\n".join(lines) + "\n"


def table(parts: Mapping[str, Fields]) -> Iterator[tuple[str, str, str]]:
    """Part, what was measured, and the value of each row."""
    for name, part in parts.items():
        took = f"{part['status']}, {part['seconds']:.0f} s"
        yield name, "status", f"{took}: {part['reason']}" if "reason" in part else took
        if part["status"] != "passed":
            continue
        yield from ((name, what, value) for what, value in ROWS[name](part["results"]))


def test_rows(results: Fields) -> Iterator[tuple[str, str]]:
    """Of the tests."""
    yield "tests", f"{results['passed']} passed, {results['skipped']} skipped"


def op_rows(results: Fields) -> Iterator[tuple[str, str]]:
    """Of the ops: milliseconds forward and backward, and memory where it was measured."""
    for row in results["logits"]:
        where = f"from logits, {row['N']} x {row['V']:,} {row['dtype']}"
        copy = f"{row['copy_ms']:.2f} ms, {row['copy_gb_s']:,.0f} GB/s"
        yield f"{where}: a copy", copy
        for name, units in row["units"].items():
            value = f"{units * row['read_ms']:.2f} ms{peak(row, name)}"
            region = name.removeprefix("ours ")
            if region != name:
                value += f", {row['of the roofline'][region]:.0%} of the roofline"
            yield f"{where}: {name}", value
    for row in results["linear"]:
        where = f"from hidden states, {row['N']} x {row['D']:,} x {row['V']:,} {row['dtype']}, full"
        for name, share in row["of the head"].items():
            yield f"{where}: {name}", f"{1e3 * share * row['head_s']:.2f} ms{peak(row, name)}"
        if row["no Liger"]:
            yield f"{where}: Liger", row["no Liger"]


def peak(row: Fields, name: str) -> str:
    """The memory above the inputs, if it was measured."""
    return f", {row['peak_mib'][name]:,.0f} MiB" if "peak_mib" in row else ""


def update_rows(results: Fields) -> Iterator[tuple[str, str]]:
    """Of the update."""
    where = f"GRPO, {results['size']}"
    for row in results["rows"]:
        seconds = f"{row['s']:.2f} s an iteration, of it sampling {row['sampling, s']:.2f}"
        yield (
            f"{where}: {row['who']}",
            f"{seconds}, update {row['update, s']:.2f}; peak {row['peak, MiB']:,} MiB",
        )
    if results["no trl"]:
        yield f"{where}: trl", results["no trl"]


def smollm2_rows(results: Fields) -> Iterator[tuple[str, str]]:
    """Of the language model."""
    yield "iterations", str(results["iterations"])
    yield "peak memory of the process", f"{results['peak_mib']:,.0f} MiB"
    for tag, value in results["last"].items():
        yield f"`{tag}` at the end", f"{value:.3f}"


ROWS: dict[str, Callable[[Fields], Iterator[tuple[str, str]]]] = {
    "tests": test_rows,
    "op": op_rows,
    "update": update_rows,
    "smollm2": smollm2_rows,
}


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="a directory")
    parser.add_argument("--device", choices=SIZES, help="default: cuda where there is one")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    smollm2 = Path("runs/models/smollm2")
    parser.add_argument("--model", type=Path, default=smollm2, help="the directory of SmolLM2")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; give --device cpu for the small sizes")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: give a number above 0")
    return options


def main(words: Sequence[str] | None = None, run: Run = run_apart) -> int:
    """Run all parts; 1 if one failed."""
    options = options_of(words)
    if options.part:
        outcome = run_part(options.part, options)
        (options.out / f"{options.part}.part.json").write_text(json.dumps(outcome))
        return 0
    report = check(options, run)
    print("", *(aim["line"] for aim in report["aims"]), f"\n{options.out}/gpu_check.md", sep="\n")
    return int(any(part["status"] == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
