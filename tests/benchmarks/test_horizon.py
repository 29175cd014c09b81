"""Test of benchmarks/horizon.py: its differences and its figure from made-up results."""

from pathlib import Path

import horizon
import pytest

from tre_lightning.compare import Method, Plan, Trial
from tre_lightning.compare.results import Outcome, Results, write_results

METHODS = {"ppo": Method(), "tre": Method("tre.yaml", "coef", [0.01]), "late": Method()}


def walks(steps: int, shares: dict[tuple[str, int], float]) -> Results:
    plan = Plan(
        *(["a.yaml"], METHODS, [1, 2, 3], "out", "ppo"),
        set={"data.init_args.walks.steps": steps},
    )
    chosen = {"ppo": None, "tre": 0.01, "late": None}
    outcomes = {
        Trial(method, chosen[method], seed): Outcome(
            40, {"test/pass@1": share, "test/invalid_fraction": 0.0, "entropy/full": 0.5}
        )
        for (method, seed), share in shares.items()
    }
    return Results("plan.yaml", plan, chosen, outcomes)


def test_differences_are_of_seeds_that_both_have(tmp_path: Path) -> None:
    short = walks(2, {("ppo", 1): 0.5, ("ppo", 2): 0.75, ("tre", 2): 0.5, ("tre", 3): 1.0})
    both = {("ppo", seed): 0.5 for seed in (1, 2)} | {("tre", 1): 0.5, ("tre", 2): 0.75}
    lengths = {12: short, 48: walks(8, both)}
    assert {length: horizon.tokens(results) for length, results in lengths.items()} == {
        12: 12,
        48: 48,
    }
    found = horizon.differences(lengths, "tre", "test/pass@1")
    assert found[12].mean == -0.25 and found[12].numbers == 1
    # mean .125, standard error .125, times 12.7062
    assert found[48] == pytest.approx((0.125, -1.463276, 1.713276, 2), abs=1e-5)
    assert horizon.differences(lengths, "late", "test/pass@1") == {}  # nothing is finished
    files = []
    for length, results in lengths.items():
        files.append(tmp_path / f"{length}.json")
        write_results(files[-1], results)
    horizon.main([*map(str, files), "--out", str(tmp_path / "horizon.png")])
    assert (tmp_path / "horizon.png").read_bytes().startswith(b"\x89PNG")
