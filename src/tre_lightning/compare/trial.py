"""One trial in a process of its own: train, test, and write ``result.json``."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import cast

from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tre_lightning.callbacks.checkpoint import find_checkpoint, folder, saved_run
from tre_lightning.callbacks.summary import RunSummary
from tre_lightning.cli.main import main
from tre_lightning.common.paths import locked
from tre_lightning.compare.plan import Fields

SPECIFICATION = "trial.json"
RESULT = "result.json"
LOG = "log.txt"
# Averaged over the last tenth of the iterations.
LATE = (
    "entropy/full",
    "entropy/region_size",
    "entropy/tail_mass",
    "entropy/cumulative_tail_risk",
    "rollout/response_length",
    "policy/approx_kl",
)
HELD_OUT = ("val/", "val_")
EFFECTIVE_COEF = "_effective_coef"

Curves = dict[str, dict[int, float]]  # value by step, by tag


def run_trial(file: Path) -> None:
    """Run the trial of a ``trial.json``, from its last checkpoint if there is one.

    Raises:
        SystemExit: with 143 where SIGTERM stopped it, else as :func:`tre_lightning.cli.main.main`.
        ValueError: if another process is at this trial.
    """
    directory = file.parent
    specification: Fields = json.loads(file.read_text())
    words = [f"--config={config}" for config in specification["configs"]]
    words += specification["flags"]
    words += [
        f"--seed_everything={specification['seed']}",
        f"--trainer.default_root_dir={directory}",
    ]
    begun = (folder(directory) / "last.ckpt").exists()
    with locked(directory):
        if not begun:  # what a trial exported whose result has been deleted
            shutil.rmtree(directory / "model", ignore_errors=True)
        try:
            fit = main(["fit", *words, *(["--ckpt_path=last"] if begun else [])])
            if fit.trainer.received_sigterm:
                sys.exit(143)
            test = main(["test", *words, "--ckpt_path=last"])
            if test.trainer.received_sigterm:
                sys.exit(143)
        except SIGTERMException:
            sys.exit(143)
        summary = cast(RunSummary, fit.config_init["fit"].summary)
        tested = {tag: float(value) for tag, value in test.trainer.callback_metrics.items()}
        curves = read_curves(directory)
        held_out = {tag: points for tag, points in curves.items() if tag.startswith(HELD_OUT)}
        result = {
            **{key: specification[key] for key in ("method", "value", "seed")},
            "iterations": saved_run(find_checkpoint("last", directory))["iteration"],
            "seconds": summary.seconds,
            "test": {tag: value for tag, value in tested.items() if tag.startswith("test")},
            "final": {tag: last(points) for tag, points in held_out.items()},
            "best": {tag: max(points.values()) for tag, points in held_out.items()},
            "late": {
                tag: late_mean(points)
                for tag, points in curves.items()
                if tag in LATE or tag.endswith(EFFECTIVE_COEF)
            },
        }
        write_json(directory / RESULT, _without_nan(result))
        if not specification["keep_checkpoints"]:
            shutil.rmtree(folder(directory))


def read_curves(directory: Path) -> Curves:
    """Every logged scalar of a run that is a number."""
    events = EventAccumulator(str(directory), {"scalars": 0}).Reload()
    curves: Curves = {}
    for tag in events.Tags()["scalars"]:
        points = {e.step: e.value for e in events.Scalars(tag) if math.isfinite(e.value)}
        if points:
            curves[tag] = points
    return curves


def last(points: dict[int, float]) -> float:
    """The value of the highest step."""
    return points[max(points)]


def late_mean(points: dict[int, float]) -> float:
    """Mean over the last tenth of the steps, rounded up."""
    steps = sorted(points)
    late = steps[-math.ceil(len(steps) / 10) :]
    return math.fsum(points[step] for step in late) / len(late)


def write_json(file: Path, content: Fields) -> None:
    """Write a JSON file atomically."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(file)


def _without_nan(result: Fields) -> Fields:
    """The value with null for NaN and infinities, which JSON lacks."""
    for key, value in result.items():
        if isinstance(value, dict):
            result[key] = _without_nan(value)
        elif isinstance(value, float) and not math.isfinite(value):
            result[key] = None
    return result
