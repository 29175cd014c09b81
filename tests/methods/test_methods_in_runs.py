"""Every method in whole runs: what it logs, and that neither layout, resume nor company change it.

Each row of ``CASES`` is trained once, in double precision; the tests compare others with that run.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import runs

Curves = Mapping[str, list[float]]

# AdamW would make a whole step of the sign of a gradient that is all but 0, hence the eps.
PRECISE: dict[str, Any] = {
    "trainer.precision": "64-true",
    "model.optim.eps": 1e-4,
    "model.ppo.micro_batch_size": 16,
    "checkpoint": {"keep_all": True},
}


def same(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def tre(logged: Curves) -> None:
    same(logged["loss/tre_coef"], [0.03, 0.02, 0.01, 0.01])
    # log|V| / log|A| is at least 1, and above it where the region is not everything.
    pairs = zip(logged["loss/tre_effective_coef"], logged["loss/tre_coef"], strict=True)
    assert all(effective >= coef for effective, coef in pairs)


def entropy(logged: Curves) -> None:
    for tag in ("loss/entropy_coef", "loss/entropy_effective_coef"):
        same(logged[tag], [0.02] * runs.ITERATIONS)
    full = [-0.02 * value for value in logged["entropy/full"]]
    assert logged["loss/entropy"] == pytest.approx(full, rel=0.01)  # the policy moves within one


def adaptive_entropy(logged: Curves) -> None:
    entropies = logged["loss/adaptive_entropy_entropy"]
    same(entropies, logged["entropy/full"])
    assert entropies[0] > 3.83 > max(entropies[1:])
    same(logged["loss/adaptive_entropy_coef"], [0.0, 0.005, 0.01, 0.015])
    same(logged["loss/adaptive_entropy_next_coef"], [0.005, 0.01, 0.015, 0.02])


def aent(logged: Curves) -> None:
    entropies = logged["loss/aent_entropy"]
    assert all(3.0 < entropy <= math.log(34) for entropy in entropies)
    steps = [0.1 * (3.6 - entropy) for entropy in entropies]
    same(logged["loss/aent_coef"], [0.01 + sum(steps[: i + 1]) for i in range(runs.ITERATIONS)])


def paec(logged: Curves) -> None:
    entropies = logged["loss/paec_entropy"]
    assert logged["loss/paec_anchor"] == [entropies[0]] * runs.ITERATIONS
    below = [max(0.0, entropies[0] - entropy) for entropy in entropies]
    same(logged["loss/paec_coef"], [2 * 5.0 * gap for gap in below])
    assert any(below)


def siren(logged: Curves) -> None:
    entropies = logged["loss/siren_entropy"]
    assert logged["loss/siren_anchor"] == [entropies[0]] * runs.ITERATIONS
    gaps = [2 * 5.0 * (entropy - entropies[0]) for entropy in entropies]
    same(logged["loss/siren_coef"], gaps)
    assert any(gaps)


def repo(logged: Curves) -> None:
    entropies = logged["loss/repo_entropy"]
    assert logged["loss/repo_target"] == [entropies[0]] * runs.ITERATIONS
    assert max(entropies[1:]) < entropies[0]
    same(logged["loss/repo_zeta"], [0.02, 0.04, 0.05, 0.05])


def positive_advantage(logged: Curves) -> None:
    same(logged["loss/positive_advantage_weight"], [0.5, 0.4, 0.3, 0.2])
    same(logged["policy/active_fraction"], [1.0] * runs.ITERATIONS)


def entrocraft(logged: Curves) -> None:
    same(logged["loss/entrocraft_low"], [2.0, 1.5, 1.0, 1.0])
    same(logged["loss/entrocraft_high"], [3.0] * runs.ITERATIONS)
    assert min(logged["loss/entrocraft_entropy"]) > 3.0
    assert all(0.0 < fraction < 1.0 for fraction in logged["policy/active_fraction"])


def active(fraction: float) -> Callable[[Curves], None]:
    def check(logged: Curves) -> None:
        # 16 responses of at most 8 tokens in 2 minibatches: rounding is less than 1 token in 8.
        assert all(fraction <= f < fraction + 1 / 8 for f in logged["policy/active_fraction"])

    return check


def ignore(logged: Curves) -> None: ...


@dataclass(frozen=True)
class Case:
    """A method with options by which it acts in the tiny run.

    ``off`` makes it plain PPO, if anything does. ``tags`` are what it logs beyond what plain PPO
    does; of a ``term`` the loss and its coefficients besides. ``layout``: whether micro-batches may
    be compared by the weights.
    """

    kind: str
    options: Mapping[str, Any]
    off: Mapping[str, Any] | None = field(default_factory=lambda: {"coef": 0.0})
    tags: tuple[str, ...] = ()
    term: bool = True
    stateful: bool = False
    layout: bool = True
    curves: Callable[[Curves], None] = ignore

    def spec(self, name: str, **changes: Any) -> dict[str, Any]:
        """The method as a config names it."""
        options = {"name": name, **self.options, **changes}
        return {"class_path": f"tre_lightning.methods.{self.kind}", "init_args": options}


SCHEDULE = {
    "class_path": "tre_lightning.methods.LinearSchedule",
    "init_args": {"start": 0.03, "end": 0.01, "iterations": 2},
}
ACTIVE = ("policy/active_fraction",)
WEIGHTS: dict[str, Any] = {"term": False, "tags": ACTIVE}
FORKING: dict[str, Any] = {"off": {"fraction": 1.0}, **WEIGHTS}
SIREN_TAGS = ("loss/{}_anchor", "loss/{}_entropy")
CASES = {
    "tre": Case("TrustRegionEntropy", {"top_p": 0.9, "coef": SCHEDULE}, curves=tre),
    "tre_min_p": Case("TrustRegionEntropy", {"min_p": 0.5, "coef": 0.05}),
    "tre_of_behaviour": Case(
        "TrustRegionEntropy", {"top_k": 3, "coef": 0.05, "region_of": "behaviour"}
    ),
    "tre_of_reference": Case(
        "TrustRegionEntropy",
        {"top_k": 3, "coef": 0.05, "region_of": "reference"},
        tags=("rollout/ref_kl",),
    ),
    "entropy": Case("EntropyBonus", {"coef": 0.02}, curves=entropy),
    "adaptive_entropy": Case(  # the entropy falls through the target after the first iteration
        "AdaptiveEntropy",
        {"coef": 0.01, "target": 3.83, "delta": 0.005},
        off={"coef": 0.0, "delta": 0.0},
        tags=("loss/{}_entropy", "loss/{}_next_coef"),
        stateful=True,
        curves=adaptive_entropy,
    ),
    "aent": Case(  # the clamped entropy is near log 34 = 3.53
        "AEnt",
        {"coef": 0.01, "low": 3.6, "high": 3.7, "step": 0.1, "coef_max": 1.0},
        tags=("loss/{}_entropy",),
        stateful=True,
        curves=aent,
    ),
    # At the first update the difference is rounding, whose sign counts: see test_covariance.py.
    "kl_cov": Case("KLCov", {"fraction": 0.3}, layout=False),
    "clip_cov": Case(
        "ClipCov",
        {"fraction": 0.1, "low": -100.0, "high": 100.0},
        off={"fraction": 0.0},
        curves=active(0.9),
        **WEIGHTS,
    ),
    # Before those that shape advantages too, as it replaces them.
    "weighted_reinforce": Case(
        "WeightedReinforce", {"positive": 0.3, "threshold": 0.05}, off=None, term=False
    ),
    "repo": Case(
        "REPO",
        {"zeta": 0.02},
        off={"zeta": 0.0},
        tags=("loss/{}_zeta", "loss/{}_entropy", "loss/{}_target"),
        term=False,
        stateful=True,
        curves=repo,
    ),
    "positive_advantage": Case(
        "PositiveAdvantageReweighting",
        {"weight": 0.5, "target": 9.0, "step": 0.1},
        off={"weight": 1.0, "target": None},
        tags=(*ACTIVE, "loss/{}_weight", "loss/{}_entropy"),
        term=False,
        stateful=True,
        curves=positive_advantage,
    ),
    "entrocraft": Case(  # all of the tiny run lies above the band
        "Entrocraft",
        {
            "low": {
                "class_path": "tre_lightning.methods.LinearSchedule",
                "init_args": {"start": 2.0, "end": 1.0, "iterations": 2},
            },
            "high": 3.0,
        },
        off={"low": 0.0, "high": 100.0},
        tags=(*ACTIVE, "loss/{}_low", "loss/{}_high", "loss/{}_entropy"),
        term=False,
        curves=entrocraft,
    ),
    "lp_reg": Case("LpReg", {"coef": 50.0, "min_p": 0.5, "fraction": 0.5}),
    "entropy_advantage": Case("EntropyAdvantage", {"alpha": 0.4}, off={"alpha": 0.0}, term=False),
    "forking_tokens": Case("ForkingTokens", {"fraction": 0.2}, curves=active(0.2), **FORKING),
    "forking_selected": Case(
        "ForkingTokens",
        {"fraction": 0.5, "average_over": "selected"},
        curves=active(0.5),
        **FORKING,
    ),
    "paec": Case(
        "PAEC",
        {"coef": 5.0, "anchor_iterations": 1, "floor_fraction": 1.0},
        tags=SIREN_TAGS,
        stateful=True,
        curves=paec,
    ),
    "siren": Case("SIREN", {"coef": 5.0}, tags=SIREN_TAGS, stateful=True, curves=siren),
    "siren_in_responses": Case(
        "SIREN", {"coef": 5.0, "within": "response"}, tags=SIREN_TAGS, stateful=True
    ),
}


def train(run_dir: Path, *methods: dict[str, Any], epochs: int = 2, **ppo: Any) -> Path:
    """A run of two iterations an epoch with these methods; returns its directory."""
    changes = {**PRECISE, "trainer.callbacks": list(methods) or None}
    changes |= {f"model.ppo.{name}": value for name, value in ppo.items()}
    runs.run(run_dir, f"--trainer.max_epochs={epochs}", changes=changes)
    return run_dir


def curves(run_dir: Path) -> dict[str, list[float]]:
    return {tag: [v for _, v in events] for tag, events in runs.scalars(run_dir).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a method; tests only read these runs."""
    return train(tmp_path_factory.mktemp("plain") / "run")


# ----- each alone


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp(name) / "run", CASES[name].spec(name))


def test_it_acts_and_logs_its_own_numbers(name: str, alone: Path, plain: Path) -> None:
    assert runs.distance(runs.weights(alone), runs.weights(plain)) > 1e-3
    case, logged = CASES[name], curves(alone)
    of_term = ("loss/{}", "loss/{}_coef", "loss/{}_effective_coef") if case.term else ()
    expected = {tag.format(name) for tag in (*case.tags, *of_term)}
    assert logged.keys() - runs.scalars(plain).keys() == expected
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert all(len(logged[tag]) == runs.ITERATIONS for tag in expected - {f"loss/{name}"})
    case.curves(logged)


def test_it_resumes(name: str, alone: Path, tmp_path: Path) -> None:
    run_dir, case = tmp_path / "resumed", CASES[name]
    shutil.copytree(alone, run_dir)
    changes = {**PRECISE, "trainer.callbacks": [case.spec(name)]}
    runs.resume(run_dir, f"{run_dir}/checkpoints/iteration=3.ckpt", changes=changes)
    assert runs.distance(runs.weights(run_dir), runs.weights(alone)) == 0.0
    assert runs.scalars(run_dir) == runs.scalars(alone)
    left, right = (runs.checkpoint(d)["callbacks"] for d in (run_dir, alone))
    key = f"{case.kind}[{name}]"
    assert left.get(key) == right.get(key) and bool(left.get(key)) == case.stateful


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].layout], scope="module")
def test_micro_batches_change_nothing(name: str, alone: Path, tmp_path: Path) -> None:
    small = train(tmp_path / "small", CASES[name].spec(name), epochs=1, micro_batch_size=3)
    assert runs.distance(runs.weights(small), runs.weights(alone, "iteration=2")) < 1e-6


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].off is not None], scope="module")
def test_switched_off_it_is_plain_ppo(name: str, plain: Path, tmp_path: Path) -> None:
    case = CASES[name]
    assert case.off is not None
    off = train(tmp_path / "off", case.spec(name, **case.off), epochs=1)
    # For a method that needs the reference the old log-probabilities are computed once more.
    rounding = 1e-14 if name == "tre_of_reference" else 0.0
    assert runs.distance(runs.weights(off), runs.weights(plain, "iteration=2")) <= rounding
    if case.kind == "ForkingTokens":
        assert curves(off)["policy/active_fraction"] == [1.0] * 2


# ----- all in one run


def specs(*left_out: str) -> list[dict[str, Any]]:
    always = {"adaptive_entropy": {"target": 9.0}}  # the others hold the entropy up
    kept = {name: case for name, case in CASES.items() if name not in left_out}
    return [case.spec(name, **always.get(name, {})) for name, case in kept.items()]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but KL-Cov, of whose first update rounding decides."""
    return train(tmp_path_factory.mktemp("together") / "run", *specs("kl_cov"), epochs=1)


def test_terms_add_up(together: Path) -> None:
    logged = {tag: dict(events) for tag, events in runs.scalars(together).items()}
    terms = {name for name, case in CASES.items() if case.term and name != "kl_cov"}
    acting = {name for name in terms if logged[f"loss/{name}_coef"][1] != 0.0}
    assert acting >= terms - {"paec"}  # the others may hold the entropy above its floor
    parts = {name: logged[f"loss/{name}"][1] for name in ("policy", "value", *acting)}
    assert all(parts.values())
    assert logged["loss/total"][1] == pytest.approx(sum(parts.values()), abs=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.term])
def test_what_is_no_term_acts_beside_the_others(name: str, together: Path, tmp_path: Path) -> None:
    others = train(tmp_path / "run", *specs("kl_cov", name), epochs=1)
    assert runs.distance(runs.weights(together), runs.weights(others)) > 1e-3


def test_fused_is_the_reference(together: Path, tmp_path: Path) -> None:
    reference = train(tmp_path / "run", *specs("kl_cov"), epochs=1, fused=False)
    assert 0.0 < runs.distance(runs.weights(reference), runs.weights(together)) < 1e-6
    runs.assert_close_curves(reference, together)
