"""Test of benchmarks/horizon.py: its tables from made-up results."""

import json
from pathlib import Path

import horizon
import pytest

from tre_lightning.compare import Method, Plan, Trial
from tre_lightning.compare.trial import RESULT


def test_differences_are_of_seeds_that_both_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(horizon, "read_curves", lambda _: {"val/pass@1": {0: 0.25, 40: 0.9}})
    methods = {"ppo": Method(), "tre": Method("tre.yaml", "coef", [0.01]), "late": Method()}
    plan = Plan(["a.yaml"], methods, [1, 2, 3], str(tmp_path / "out"), "ppo")
    for method, value, seed, share in [
        ("ppo", None, 1, 0.5),
        ("ppo", None, 2, 0.75),
        ("tre", 0.01, 2, 0.5),
        ("tre", 0.01, 3, 1.0),
    ]:
        directory = Trial(method, value, seed).directory(plan)
        directory.mkdir(parents=True)
        tested = {"test/pass@1": share, "test/pass@8": 1.0, "test/invalid_fraction": 0.125}
        late = {"entropy/full": 0.5, "entropy/tail_mass": 0.002, "loss/tre_effective_coef": 0.1}
        (directory / RESULT).write_text(json.dumps({"test": tested, "late": late}))
    means, paired = horizon.tables({12: (plan, horizon.collect(plan))}).split("\n\n")
    rows = [line.split(" | ")[:8] for line in means.splitlines()[2:]]
    assert rows[0][1:7] == ["ppo", "", "0.1", "2", "0.250", "0.625 (0.500 to 0.750)"]
    assert rows[1][1:7] == ["tre", "0.01", "0.1", "2", "0.250", "0.750 (0.500 to 1.000)"]
    assert len(rows) == 2  # nothing of "late" is finished
    (row,) = (line for line in paired.splitlines() if line.startswith("| 12 "))
    assert row.startswith("| 12 | tre | 1 | -0.250 | +0.000 | +0.000 | +0.000 | +0.00e+00 |")
