"""One table and one figure of the comparisons at several lengths of response.

    python benchmarks/horizon.py --out runs/compare/horizon \
        --config configs/compare/horizon_12.yaml configs/compare/horizon_48.yaml \
        configs/compare/horizon_126.yaml configs/compare/horizon_252.yaml

Reads what ``python -m tre_lightning.compare`` has left behind, finished trials only. Writes
``horizon.md`` and, where matplotlib is installed, ``horizon.png``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tre_lightning.compare import Plan, read_plan
from tre_lightning.compare.report import effective_coef, metric
from tre_lightning.compare.run import choose, result_of
from tre_lightning.compare.statistics import Estimate, differences, estimate, mean
from tre_lightning.compare.trial import read_curves

Results = dict[str, dict[int, dict[str, Any]]]  # of each method and seed
COMPARED = (
    "test/pass@1",
    "test/pass@k",
    "test/invalid_fraction",
    "entropy/full",
    "entropy/tail_mass",
)
NAMES = ("pass@1", "pass@8", "invalid responses", "entropy, nats", "tail mass")


def collect(plan: Plan) -> Results:
    """Results of the finished trials."""
    found: Results = {name: {} for name in plan.methods}
    for trial in plan.final(choose(plan)):
        result = result_of(plan, trial)
        if result is not None:
            curve = read_curves(trial.directory(plan))["val/pass@1"]
            found[trial.method][trial.seed] = {**result, "start": curve[min(curve)]}
    return found


def difference(found: Results, plan: Plan, name: str, tag: str) -> Estimate:
    """Method minus baseline, of the seeds that both have."""
    own, base = (
        {seed: metric(result, tag) for seed, result in found[method].items()}
        for method in (name, plan.baseline)
    )
    return estimate(list(differences(own, base).values()))


def written(tag: str, value: float, sign: str = "") -> str:
    """A value as it stands in the tables."""
    return f"{value:{sign}.2e}" if tag == "entropy/tail_mass" else f"{value:{sign}.3f}"


def spread(tag: str, value: Estimate, sign: str = "") -> str:
    """A mean and its interval."""
    if value.low != value.low:
        return written(tag, value.mean, sign)
    low, high = (written(tag, end, sign) for end in (value.low, value.high))
    return f"{written(tag, value.mean, sign)} ({low} to {high})"


def tables(lengths: dict[int, tuple[Plan, Results]]) -> str:
    """Means with intervals, then differences to the baseline."""
    head = ["tokens", "method", "coef", "effective coef", "seeds", "val pass@1 before RL", *NAMES]
    means, paired = (
        [head, ["---"] * len(head)],
        [["tokens", "method", "seeds", *NAMES], ["---"] * 8],
    )
    for tokens, (plan, found) in lengths.items():
        for name, by_seed in found.items():
            results = list(by_seed.values())
            if not results:
                continue
            value = choose(plan)[name]
            strength = effective_coef(results)
            line = [str(tokens), name, "" if value is None else str(value)]
            line += ["" if strength != strength else f"{strength:.3g}", str(len(results))]
            line.append(f"{mean([r['start'] for r in results]):.3f}")
            values = [estimate([metric(r, tag) for r in results]) for tag in COMPARED]
            means.append([*line, *map(spread, COMPARED, values)])
            if name != plan.baseline:
                values = [difference(found, plan, name, tag) for tag in COMPARED]
                cells = [spread(t, v, "+") for t, v in zip(COMPARED, values, strict=True)]
                paired.append(
                    [
                        str(tokens),
                        name,
                        str(len(found[name].keys() & found[plan.baseline].keys())),
                        *cells,
                    ]
                )
    return "\n".join(
        "".join(f"| {' | '.join(row)} |\n" for row in rows) for rows in (means, paired)
    )


def draw(lengths: dict[int, tuple[Plan, Results]], file: Path) -> None:
    """Differences to the baseline by length, with their intervals."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = (0, 2, 3, 4)
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(16, 4), layout="constrained")
    first, _ = next(iter(lengths.values()))
    names = [name for name in first.methods if name != first.baseline]
    for axis, place in zip(axes, drawn, strict=True):
        for number, name in enumerate(names):
            points = [
                (tokens, difference(found, plan, name, COMPARED[place]))
                for tokens, (plan, found) in lengths.items()
                if found[name]
            ]
            alike = [n for n in names if first.methods[n].config == first.methods[name].config]
            x = [tokens * 1.04 ** (number - len(names) / 2) for tokens, _ in points]
            y = [value.mean for _, value in points]
            error = [[v.mean - v.low for _, v in points], [v.high - v.mean for _, v in points]]
            axis.errorbar(
                x,
                y,
                yerr=error,
                fmt="o-" if name == alike[0] else "s--",
                color=f"C{names.index(alike[0])}",
                capsize=3,
                label=f"{name} {choose(first)[name]}",
            )
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set(title=f"{NAMES[place]}: difference to {first.baseline}", xscale="log")
        axis.set_xticks([*lengths], [*map(str, lengths)])
        axis.set_xlabel("tokens of a response")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", required=True, help="files of comparisons")
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    options = parser.parse_args(arguments)
    lengths = {}
    for file in options.config:
        plan = read_plan(file)
        lengths[6 * int(plan.set["data.init_args.walks.steps"])] = (plan, collect(plan))
    options.out.mkdir(parents=True, exist_ok=True)
    text = tables(lengths)
    (options.out / "horizon.md").write_text(text)
    print(text)
    draw(lengths, options.out / "horizon.png")


if __name__ == "__main__":
    main()
