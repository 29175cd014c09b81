"""What a comparison measured: every number behind its tables and its figure, as one JSON file."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tre_lightning.compare.plan import Fields, Method, Plan, Trial, Value
from tre_lightning.compare.run import choose, result_of
from tre_lightning.compare.trial import EFFECTIVE_COEF, Curves, read_curves

RESULTS = "results.json"
DRAWN = ("val/pass@1", "entropy/full", "entropy/tail_mass")
KEPT = (
    "test/invalid_fraction",
    "test/response_length",
    "entropy/full",
    "entropy/tail_mass",
    "entropy/region_size",
)
POINTS = 20  # of a curve in the file


@dataclass(frozen=True)
class Outcome:
    """One finished trial.

    Args:
        iterations: of PPO.
        metrics: by tag, six digits: ``test/`` after the last iteration, ``val/`` at the last
            validation, others a mean over the last tenth of the iterations. What is no number is
            left out.
        curves: value by step, by tag.
    """

    iterations: int
    metrics: dict[str, float]
    curves: Curves = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The finished trials of a plan.

    Args:
        config: file of the plan.
        plan: the comparison.
        chosen: value of each method that is reported; methods without any are left out.
        outcomes: by trial, those of the sweep too.
    """

    config: str
    plan: Plan
    chosen: dict[str, Value | None]
    outcomes: dict[Trial, Outcome]

    def final(self, method: str) -> dict[int, Outcome]:
        """What is reported of a method, by seed."""
        return self._of([t for t in self.plan.final(self.chosen) if t.method == method])

    def sweep(self, method: str, value: Value | None) -> dict[int, Outcome]:
        """What a value was chosen by, by seed."""
        return self._of([Trial(method, value, seed) for seed in self.plan.sweep_seeds])

    def _of(self, trials: list[Trial]) -> dict[int, Outcome]:
        return {t.seed: self.outcomes[t] for t in trials if t in self.outcomes}


def collect(plan: Plan, config: str) -> Results:
    """Read what the finished trials have left behind; ``config`` is the plan's file."""
    chosen = choose(plan)
    final = plan.final(chosen)
    outcomes = {}
    for trial in dict.fromkeys([*final, *plan.sweep]):
        result = result_of(plan, trial)
        if result is not None:
            curves = read_curves(trial.directory(plan)) if trial in final else {}
            drawn = {tag: points for tag, points in curves.items() if tag in DRAWN}
            metrics = _metrics(result, plan.choose_by)
            outcomes[trial] = Outcome(result["iterations"], metrics, drawn)
    return Results(config, plan, chosen, outcomes)


def _metrics(result: Fields, choose_by: str) -> dict[str, float]:
    values = {**result["late"], **result["final"], **result["test"]}
    return {
        tag: float(f"{value:.6g}")
        for tag, value in values.items()
        if value is not None
        if tag in (*KEPT, choose_by)
        or tag.endswith(EFFECTIVE_COEF)
        or re.fullmatch(r"test/pass@\d+", tag)
    }


def thinned(points: Mapping[int, float]) -> dict[int, float]:
    """About ``POINTS`` of them, the first and the last among these, four digits each."""
    first, last = min(points), max(points)
    stride = math.ceil((last - first) / POINTS) if len(points) > POINTS else 1
    return {
        step: float(f"{value:.4g}")
        for step, value in points.items()
        if (step - first) % stride == 0 or step == last
    }


def write_results(file: Path, results: Results) -> None:
    """Write the file, a line for each trial, its curves thinned."""
    head = {"config": results.config, "plan": asdict(results.plan), "chosen": results.chosen}
    lines = []
    for trial, outcome in results.outcomes.items():
        curves = {tag: list(thinned(points).items()) for tag, points in outcome.curves.items()}
        lines.append(json.dumps({**asdict(trial), **asdict(outcome), "curves": curves}))
    trials = ",\n".join(lines)
    file.write_text(json.dumps(head, indent=1)[:-2] + f',\n "trials": [\n{trials}\n ]\n}}\n')


def read_results(file: Path) -> Results:
    """Read what :func:`write_results` wrote."""
    content: Fields = json.loads(file.read_text())
    methods = {name: Method(**fields) for name, fields in content["plan"].pop("methods").items()}
    outcomes = {}
    for line in content["trials"]:
        curves = {tag: dict(points) for tag, points in line["curves"].items()}
        trial = Trial(line["method"], line["value"], line["seed"])
        outcomes[trial] = Outcome(line["iterations"], line["metrics"], curves)
    plan = Plan(methods=methods, **content["plan"])
    return Results(content["config"], plan, content["chosen"], outcomes)
