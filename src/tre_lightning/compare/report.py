"""The tables of a comparison as Markdown."""

import math
import re
from collections.abc import Mapping, Sequence

from tre_lightning.compare.plan import Fields, Plan, Trial, Value
from tre_lightning.compare.run import choose, result_of
from tre_lightning.compare.statistics import Estimate, differences, estimate, mean
from tre_lightning.compare.trial import EFFECTIVE_COEF

PASS_AT_K = "test/pass@k"
FINAL = (
    "test/pass@1",
    PASS_AT_K,
    "test/invalid_fraction",
    "entropy/full",
    "entropy/tail_mass",
    "test/response_length",
)
COMPARED = ("test/pass@1", PASS_AT_K)


def metric(result: Fields, tag: str) -> float:
    """A metric of a result, NaN without it; ``test/pass@k`` is the largest k above 1."""
    if tag == PASS_AT_K:
        found = [int(m[1]) for t in result["test"] if (m := re.fullmatch(r"test/pass@(\d+)", t))]
        tag = f"test/pass@{max(found, default=1)}"
        if tag == "test/pass@1":
            return math.nan
    groups = {"test": "test", "val": "final"}
    value = result[groups.get(tag.partition("/")[0], "late")].get(tag)
    return math.nan if value is None else float(value)


def effective_coef(results: Sequence[Fields]) -> float:
    """Mean effective coefficient of the method's loss term; NaN without one or with several."""
    found = [
        [v for tag, v in r["late"].items() if tag.endswith(EFFECTIVE_COEF) and v is not None]
        for r in results
    ]
    return mean([values[0] for values in found if len(values) == 1])


def report(plan: Plan, config: str) -> str:
    """The report on the finished trials, Markdown; ``config`` is the plan's file."""
    chosen = choose(plan)
    trials = plan.final(chosen)
    results = {
        name: _by_seed(plan, [trial for trial in trials if trial.method == name])
        for name in plan.methods
    }
    wanted = len(plan.seeds) * len(plan.methods)
    done = sum(len(found) for found in results.values())
    iterations = sorted({r["iterations"] for found in results.values() for r in found.values()})
    lines = [
        f"# Methods: {len(plan.methods)}, seeds: {len(plan.seeds)}",
        "",
        f"    python -m tre_lightning.compare --config {config}",
        "",
        f"Seeds {_joined(plan.seeds)}; {_joined(iterations) or 'no'} PPO iterations. "
        + (
            f"Each method's value is the one of highest {plan.choose_by} at the end, mean over the "
            f"seeds {_joined(plan.sweep_seeds)}."
            if plan.has_choice
            else "No value was chosen."
        ),
    ]
    if done < wanted:
        lines += ["", f"**Unfinished: {done} of {wanted} trials.**"]
    lines += ["", *_final_table(plan, chosen, results), "", *_paired_table(plan, results)]
    if plan.has_choice:
        lines += ["", *_sweep_table(plan)]
    return "\n".join(lines) + "\n"


def _final_table(
    plan: Plan, chosen: Mapping[str, Value | None], results: Mapping[str, Mapping[int, Fields]]
) -> list[str]:
    lines = [
        "## Chosen values",
        "",
        "Mean [95 % bootstrap interval over the seeds]. test/ is measured on test prompts after "
        "the last iteration, entropy/ and the effective coefficient over the last tenth of the "
        "iterations.",
        "",
        _row("method", "option", "value", "effective coef", "seeds", *FINAL),
        _row(*["---"] * (5 + len(FINAL))),
    ]
    for name, found in results.items():
        estimates = [estimate([metric(r, tag) for r in found.values()]) for tag in FINAL]
        lines.append(
            _row(
                name,
                plan.methods[name].option or "",
                _plain(chosen.get(name)),
                _number(effective_coef(list(found.values()))),
                str(len(found)),
                *(_interval(e) for e in estimates),
            )
        )
    return lines


def _paired_table(plan: Plan, results: Mapping[str, Mapping[int, Fields]]) -> list[str]:
    lines = [
        f"## Difference to {plan.baseline}",
        "",
        "By seed: both runs share the warm start, the prompts and the random numbers. Above: seeds "
        f"on which the method is above {plan.baseline}.",
        "",
        _row("method", *(word for tag in COMPARED for word in (tag, "above"))),
        _row(*["---"] * (1 + 2 * len(COMPARED))),
    ]
    for name, found in results.items():
        if name == plan.baseline:
            continue
        cells = []
        for tag in COMPARED:
            own, base = (
                {seed: metric(r, tag) for seed, r in by_seed.items()}
                for by_seed in (found, results[plan.baseline])
            )
            pairs = list(differences(own, base).values())
            above = sum(difference > 0 for difference in pairs)
            cells += [_interval(estimate(pairs), "+"), f"{above} of {len(pairs)}" if pairs else ""]
        lines.append(_row(name, *cells))
    return lines


def _sweep_table(plan: Plan) -> list[str]:
    tags = (plan.choose_by, *FINAL[:-1])
    lines = [
        "## Every value",
        "",
        f"Mean over the seeds {_joined(plan.sweep_seeds)}; compare methods at a like entropy.",
        "",
        _row("method", "option", "value", "effective coef", "seeds", *tags),
        _row(*["---"] * (5 + len(tags))),
    ]
    for name, method in plan.methods.items():
        for value in method.settings:
            trials = [Trial(name, value, seed) for seed in plan.sweep_seeds]
            found = list(_by_seed(plan, trials).values())
            lines.append(
                _row(
                    name,
                    method.option or "",
                    _plain(value),
                    _number(effective_coef(found)),
                    str(len(found)),
                    *(_number(mean([metric(r, tag) for r in found])) for tag in tags),
                )
            )
    return lines


def _by_seed(plan: Plan, trials: Sequence[Trial]) -> dict[int, Fields]:
    found = {trial.seed: result_of(plan, trial) for trial in trials}
    return {seed: result for seed, result in found.items() if result is not None}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _joined(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _plain(value: Value | None) -> str:
    return "" if value is None else str(value)


def _number(value: float, sign: str = "") -> str:
    """Four digits, blank for NaN; small numbers keep theirs."""
    if math.isnan(value):
        return ""
    return f"{value:{sign}.2e}" if 0 < abs(value) < 1e-3 else f"{value:{sign}.4g}"


def _interval(value: Estimate, sign: str = "") -> str:
    middle = _number(value.mean, sign)
    if math.isnan(value.low):
        return middle
    return f"{middle} [{_number(value.low, sign)}, {_number(value.high, sign)}]"
