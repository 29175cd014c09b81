"""Outputs and whole tiny runs for the tests of the methods."""

import functools
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runs
from tre_lightning.methods import LossTerm, PolicyOutputs
from tre_lightning.methods.hooks import weighed
from tre_lightning.policy.head import HeadOptions, head_outputs

Spec = Mapping[str, Any]

KEEP = {"checkpoint": {"keep_all": True}}
TWO_ITERATIONS = "--trainer.max_epochs=1"
_cache = tempfile.TemporaryDirectory(prefix="tre_lightning_tests_")


def entropy(*weights: float) -> float:
    """Of these weights once they add up to 1, nats."""
    q = [w / sum(weights) for w in weights]
    return -sum(p * math.log(p) for p in q)


def outputs(term: LossTerm, logits: Tensor) -> PolicyOutputs:
    """What a term is given of tokens ``[n]`` that have these logits ``[n, V]``."""
    regions = (*term.regions, *term.observed_regions)
    asked = HeadOptions(regions, temperature=1.0, memory=1, fused=True)
    return head_outputs(logits, None, torch.zeros(len(logits), dtype=torch.long), asked)


def mean_loss(term: LossTerm, logits: Tensor, batch: Any) -> Tensor:
    """The term as the module adds it to the loss of a batch of one row."""
    weights = weighed(batch, [term], (0,)).weights[term.name][batch.response_mask]
    losses = term.per_token(outputs(term, logits), None)  # type: ignore[arg-type]
    return term.coef_at(0) * (weights * losses).sum() / len(losses)


def spec(name: str, **init_args: Any) -> dict[str, Any]:
    """A method of the package as a config names it."""
    return {"class_path": f"tre_lightning.methods.{name}", "init_args": init_args}


def run(run_dir: Path, *methods: Spec, flags: tuple[str, ...] = (), **changes: Any) -> Path:
    """Run the tiny configuration with these methods; returns its directory."""
    runs.run(run_dir, *flags, changes={"trainer.callbacks": list(methods) or None, **changes})
    return run_dir


@functools.cache
def plain() -> Path:
    """A finished run of plain PPO; tests only read it."""
    return run(Path(_cache.name) / "plain")


def logged(run_dir: Path, tag: str) -> list[float]:
    """What a run logged, in order."""
    return [value for _, value in runs.scalars(run_dir)[tag]]


def assert_off(off: Path, on: Path) -> None:
    """The run ``off`` trained as plain PPO does, bit for bit; ``on`` did not."""
    expected = runs.weights(plain())
    assert runs.distance(runs.weights(off), expected) == 0.0
    assert runs.distance(runs.weights(on), expected) > 0.0


def assert_resumes(whole: Path, tmp_path: Path, method: Spec, iteration: int = 2) -> None:
    """A run that goes on from a checkpoint ends as ``whole``, which kept all of them, did."""
    run_dir = tmp_path / "resumed"
    shutil.copytree(whole, run_dir)
    changes = {"trainer.callbacks": [method], **KEEP}
    runs.resume(run_dir, f"{run_dir}/checkpoints/iteration={iteration}.ckpt", changes=changes)
    assert runs.distance(runs.weights(run_dir), runs.weights(whole)) == 0.0
    assert runs.scalars(run_dir) == runs.scalars(whole)
    left, right = (runs.checkpoint(d)["callbacks"] for d in (run_dir, whole))
    name = method["class_path"].split(".")[-1]
    key = next(key for key in left if key.startswith(f"{name}["))
    assert left[key] == right[key] and left[key]


def assert_adds_to_tre(tmp_path: Path, name: str, method: Spec) -> None:
    """Beside TRE both terms are in the loss of the second iteration, and nothing else."""
    run_dir = run(tmp_path / "both", runs.TRE, method, flags=(TWO_ITERATIONS,))
    values = {tag: dict(events)[1] for tag, events in runs.scalars(run_dir).items() if events}
    parts = {part: values[f"loss/{part}"] for part in ("policy", "value", "tre", name)}
    assert abs(values["loss/total"] - sum(parts.values())) < 1e-6
    assert all(parts.values())


def assert_micro_batches_change_nothing(tmp_path: Path, method: Spec) -> None:
    """Micro-batches of 3 and of 16 rows train the same, in double precision."""
    for size in (3, 16):
        # AdamW would make a whole step of the sign of a gradient that is all but 0, hence the eps.
        flags = (f"--model.ppo.micro_batch_size={size}", "--model.optim.eps=1e-4")
        precise = ("--trainer.precision=64-true", TWO_ITERATIONS)
        run(tmp_path / f"{size}", method, flags=(*flags, *precise))
    left, right = (runs.weights(tmp_path / f"{size}") for size in (3, 16))
    assert runs.distance(left, right) < 1e-6
