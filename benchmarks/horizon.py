"""One figure of the comparisons at several lengths of response.

    python benchmarks/horizon.py --out runs/horizon.png runs/compare/horizon_12/results.json \
        runs/compare/horizon_48/results.json runs/compare/horizon_126/results.json

Reads what ``python -m tre_lightning.compare`` has written, and needs matplotlib.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tre_lightning.compare.report import COLUMNS, paired
from tre_lightning.compare.results import Results, read_results
from tre_lightning.compare.statistics import Estimate, estimate

DRAWN = (COLUMNS[0], COLUMNS[2], COLUMNS[3])


def tokens(results: Results) -> int:
    """Length of a right response."""
    return 6 * int(results.plan.set["data.init_args.walks.steps"])


def draw(comparisons: Iterable[Results], file: Path) -> None:
    """Differences to the baseline by length, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = {tokens(results): results for results in sorted(comparisons, key=tokens)}
    first = next(iter(lengths.values()))
    plan = first.plan
    names = [name for name in plan.methods if name != plan.baseline]
    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(14, 4), layout="constrained")
    for axis, column in zip(axes, DRAWN, strict=True):
        for number, name in enumerate(names):
            points = differences(lengths, name, column.tag)
            alike = [n for n in names if plan.methods[n].config == plan.methods[name].config]
            axis.errorbar(
                [length * 1.04 ** (number - len(names) / 2) for length in points],
                [value.mean for value in points.values()],
                yerr=[value.high - value.mean for value in points.values()],
                fmt="o-" if name == alike[0] else "s--",
                color=f"C{names.index(alike[0])}",
                capsize=3,
                label=f"{name} {first.chosen[name]}",
            )
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set(title=f"{column.title}: difference to {plan.baseline}", xscale="log")
        axis.set_xticks([*lengths], [*map(str, lengths)])
        axis.set_xlabel("tokens of a response")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def differences(lengths: dict[int, Results], method: str, tag: str) -> dict[int, Estimate]:
    """Method minus baseline by length, where both have finished trials."""
    found = {
        length: paired(results, method, results.plan.baseline, tag)
        for length, results in lengths.items()
    }
    return {length: estimate(values) for length, values in found.items() if values}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json of each comparison")
    parser.add_argument("--out", type=Path, required=True, help="a picture")
    options = parser.parse_args(arguments)
    draw(map(read_results, options.results), options.out)


if __name__ == "__main__":
    main()
