"""Mean curves over seeds: as a picture and as TensorBoard events."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tre_lightning.compare.plan import Plan
from tre_lightning.compare.run import choose, result_of
from tre_lightning.compare.statistics import mean
from tre_lightning.compare.trial import Curves, read_curves

TAGS = ("val/pass@1", "entropy/full", "entropy/tail_mass")
Points = dict[int, list[float]]  # a value for each seed, by step


def gather(runs: Sequence[Curves], tag: str) -> Points:
    """Values of several runs at the steps that they have in common."""
    curves = [run.get(tag, {}) for run in runs]
    shared = set(curves[0]).intersection(*curves) if curves else set()
    return {step: [curve[step] for curve in curves] for step in sorted(shared)}


def write_curves(plan: Plan) -> bool:
    """Write ``mean/<method>`` and ``curves.png``; False where matplotlib is missing."""
    found: dict[str, dict[str, Points]] = {}
    for name in plan.methods:
        trials = [trial for trial in plan.final(choose(plan)) if trial.method == name]
        runs = [read_curves(t.directory(plan)) for t in trials if result_of(plan, t) is not None]
        found[name] = {tag: gather(runs, tag) for tag in TAGS}
        _write_events(Path(plan.output) / "mean" / name, found[name])
    return _draw(Path(plan.output) / "curves.png", found)


def _write_events(directory: Path, curves: dict[str, Points]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    with SummaryWriter(str(directory)) as writer:
        for tag, points in curves.items():
            for step, values in points.items():
                writer.add_scalar(tag, mean(values), step)


def _draw(file: Path, found: dict[str, dict[str, Points]]) -> bool:
    """Mean curves with a band from the lowest to the highest seed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TAGS), figsize=(15, 4.6), layout="constrained")
    alpha = min(0.12, 0.5 / len(found))  # many bands, one over the other, would hide the curves
    for axis, tag in zip(axes, TAGS, strict=True):
        for number, (name, curves) in enumerate(found.items()):
            points = curves[tag]
            colour = pyplot.get_cmap("tab20")(number % 20)
            means = [mean(values) for values in points.values()]
            axis.plot(list(points), means, color=colour, label=name)
            lows, highs = map(min, points.values()), map(max, points.values())
            axis.fill_between(list(points), list(lows), list(highs), color=colour, alpha=alpha)
        axis.set(title=tag, xlabel="PPO iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True
