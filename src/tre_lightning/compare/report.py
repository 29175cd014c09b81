"""The tables of a comparison as Markdown."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tre_lightning.compare.plan import Value
from tre_lightning.compare.results import Outcome, Results
from tre_lightning.compare.statistics import (
    Estimate,
    differences,
    estimate,
    holm,
    mean,
    p_value,
)
from tre_lightning.compare.trial import EFFECTIVE_COEF


class Column(NamedTuple):
    """A metric of the tables; ``form`` is how its numbers are written."""

    tag: str
    title: str
    form: str = ".3f"


PASS_AT_K = "test/pass@k"
COLUMNS = (
    Column("test/pass@1", "pass@1"),
    Column(PASS_AT_K, "pass@k"),
    Column("test/invalid_fraction", "invalid responses", ".2%"),
    Column("entropy/full", "entropy, nats"),
    Column("entropy/tail_mass", "tail mass", ".2e"),
    Column("test/response_length", "response tokens", ".1f"),
)
COMPARED = COLUMNS[:3]


def metric(outcome: Outcome, tag: str) -> float:
    """A metric, NaN without it; ``test/pass@k`` is the largest k above 1."""
    if tag == PASS_AT_K:
        tag = f"test/pass@{_largest_k([outcome])}"
        if tag == "test/pass@1":
            return math.nan
    return outcome.metrics.get(tag, math.nan)


def effective_coef(outcomes: Iterable[Outcome]) -> float:
    """Mean effective coefficient of the method's loss term; NaN without one or with several."""
    found = [[v for t, v in o.metrics.items() if t.endswith(EFFECTIVE_COEF)] for o in outcomes]
    return mean([values[0] for values in found if len(values) == 1])


def report(results: Results) -> str:
    """The report on the finished trials, Markdown."""
    plan = results.plan
    final = {name: results.final(name) for name in plan.methods}
    wanted = len(plan.seeds) * len(plan.methods)
    done = sum(map(len, final.values()))
    iterations = sorted({o.iterations for found in final.values() for o in found.values()})
    lines = [
        f"# Methods: {len(plan.methods)}, seeds: {len(plan.seeds)}",
        "",
        f"    python -m tre_lightning.compare --config {results.config}",
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
    lines += [
        "",
        "## Chosen values",
        "",
        "Mean (95 % Student t interval over the seeds). pass@, invalid responses and response "
        "tokens are measured on test prompts after the last iteration, entropy, tail mass and the "
        "effective coefficient over the last tenth of the iterations.",
        "",
        final_table(results),
        f"## Difference to {plan.baseline}",
        "",
        "Mean (95 % paired t interval): both runs of a seed share the warm start, the prompts and "
        f"the random numbers. Above: seeds on which the method is above {plan.baseline}. p: of no "
        "difference, by the paired t test, corrected for the number of methods (Holm).",
        "",
        paired_table(results),
    ]
    if plan.has_choice:
        lines += [
            "## Every value",
            "",
            f"Mean over the seeds {_joined(plan.sweep_seeds)}; compare methods at a like entropy.",
            "",
            sweep_table(results),
        ]
    return "\n".join(lines)


def final_table(results: Results) -> str:
    """Every method with its chosen value: means with intervals."""
    final = {name: results.final(name) for name in results.plan.methods}
    columns = _measured(results)
    rows = [["method", "option", "value", "effective coef", "seeds", *_titles(results, columns)]]
    for name, found in final.items():
        cells = [
            _interval(estimate([metric(o, column.tag) for o in found.values()]), column.form)
            for column in columns
        ]
        rows.append([*_setting(results, name, results.chosen.get(name), found), *cells])
    return _table(rows)


def paired_table(
    results: Results, baseline: str | None = None, methods: Sequence[str] | None = None
) -> str:
    """Differences to a method by seed: means with intervals, seeds above, corrected p-values.

    Args:
        results: of a comparison.
        baseline: what to subtract; None = the plan's.
        methods: what to subtract from; None = all others.
    """
    baseline = results.plan.baseline if baseline is None else baseline
    methods = [n for n in methods or results.plan.methods if n != baseline]
    columns = [column for column in COMPARED if column in _measured(results)]
    head = [f"difference to {baseline}"]
    cells: list[list[str]] = [[name] for name in methods]
    for column, title in zip(columns, _titles(results, columns), strict=True):
        head += [title, "above", "p"]
        pairs = [paired(results, name, baseline, column.tag) for name in methods]
        corrected = holm([p_value(found) for found in pairs])
        for row, found, p in zip(cells, pairs, corrected, strict=True):
            above = sum(difference > 0 for difference in found)
            row.append(_interval(estimate(found), f"+{column.form}"))
            row.append(f"{above} of {len(found)}" if found else "")
            row.append(_number(p, ".3f"))
    return _table([head, *cells])


def paired(results: Results, method: str, baseline: str, tag: str) -> list[float]:
    """Method minus baseline, of the seeds that both have."""
    own, base = (
        {seed: metric(o, tag) for seed, o in results.final(name).items()}
        for name in (method, baseline)
    )
    return list(differences(own, base).values())


def sweep_table(results: Results) -> str:
    """Every method with every value: means over the seeds that chose."""
    chose = Column(results.plan.choose_by, results.plan.choose_by)
    columns = [chose, *(column for column in _measured(results) if column != COLUMNS[-1])]
    rows = [["method", "option", "value", "effective coef", "seeds", *_titles(results, columns)]]
    for name, method in results.plan.methods.items():
        for value in method.settings:
            found = results.sweep(name, value)
            cells = [
                _number(mean([metric(o, column.tag) for o in found.values()]), column.form)
                for column in columns
            ]
            rows.append([*_setting(results, name, value, found), *cells])
    return _table(rows)


def seeds_table(results: Results) -> str:
    """Every method with its chosen value, seed by seed."""
    columns = _measured(results)
    seeds = results.plan.seeds
    rows = [[f"seeds {_joined(seeds)}", *_titles(results, columns)]]
    for name in results.plan.methods:
        found = results.final(name)
        values = [[metric(found[s], column.tag) for s in seeds if s in found] for column in columns]
        rows.append(
            [
                name,
                *(
                    " / ".join(_number(value, column.form) for value in by_seed)
                    for column, by_seed in zip(columns, values, strict=True)
                ),
            ]
        )
    return _table(rows)


def _measured(results: Results) -> list[Column]:
    """The columns that any trial has a number for."""
    outcomes = results.outcomes.values()
    return [c for c in COLUMNS if any(math.isfinite(metric(o, c.tag)) for o in outcomes)]


def _titles(results: Results, columns: Sequence[Column]) -> list[str]:
    k = _largest_k(results.outcomes.values())
    return [column.title.replace("@k", f"@{k}") for column in columns]


def _largest_k(outcomes: Iterable[Outcome]) -> int:
    tags = [tag for outcome in outcomes for tag in outcome.metrics]
    found = [int(m[1]) for tag in tags if (m := re.fullmatch(r"test/pass@(\d+)", tag))]
    return max(found, default=1)


def _setting(
    results: Results, method: str, value: Value | None, found: Mapping[int, Outcome]
) -> list[str]:
    option = results.plan.methods[method].option or ""
    coef = _number(effective_coef(found.values()), ".3g")
    return [method, option, "" if value is None else str(value), coef, str(len(found))]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *others))


def _joined(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _number(value: float, form: str) -> str:
    """Blank for NaN."""
    return "" if math.isnan(value) else f"{value:{form}}"


def _interval(value: Estimate, form: str) -> str:
    middle = _number(value.mean, form)
    if math.isnan(value.low):
        return middle
    return f"{middle} ({value.low:{form}} to {value.high:{form}})"
