"""Mean curves over seeds: as a picture and as TensorBoard events."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tre_lightning.compare.results import DRAWN, Results
from tre_lightning.compare.statistics import mean
from tre_lightning.compare.trial import Curves

Points = dict[int, list[float]]  # a value for each seed, by step


def gather(runs: Sequence[Curves], tag: str) -> Points:
    """Values of several runs at the steps that they have in common."""
    curves = [run.get(tag, {}) for run in runs]
    shared = set(curves[0]).intersection(*curves) if curves else set()
    return {step: [curve[step] for curve in curves] for step in sorted(shared)}


def write_events(results: Results, directory: Path) -> None:
    """Write the mean curves of each method as TensorBoard events into a folder of its name."""
    for name, curves in _found(results).items():
        shutil.rmtree(directory / name, ignore_errors=True)
        with SummaryWriter(str(directory / name)) as writer:
            for tag, points in curves.items():
                for step, values in points.items():
                    writer.add_scalar(tag, mean(values), step)


def _found(results: Results) -> dict[str, dict[str, Points]]:
    """Points by tag, by method."""
    found = {}
    for name in results.plan.methods:
        runs = [outcome.curves for outcome in results.final(name).values()]
        found[name] = {tag: gather(runs, tag) for tag in DRAWN}
    return found


def draw(results: Results, file: Path) -> bool:
    """Draw the mean curves, with a band from the lowest to the highest seed.

    Returns:
        False where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = _found(results)
    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(15, 4.6), layout="constrained")
    alpha = min(0.12, 0.5 / len(found))  # many bands, one over the other, would hide the curves
    for axis, tag in zip(axes, DRAWN, strict=True):
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
