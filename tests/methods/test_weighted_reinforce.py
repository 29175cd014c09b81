"""Tests of tre_lightning.methods.weighted_reinforce."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

import batches
import runs
from tre_lightning.methods import WeightedReinforce
from tre_lightning.methods.hooks import shaped

# A right response of two tokens, a wrong one, one at the threshold, and one without a score.
MADE = batches.training_batch(
    [[0.3, 0.4], [0.5], [0.6], [0.7, 0.8]], scores=[1.0, 0.0, 0.5, math.nan]
)


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [
        ({}, 0.1, -1.0),  # W-REINFORCE
        ({"positive": 1.0, "negative": 0.0}, 1.0, 0.0),  # PSR
        ({"positive": 0.0, "negative": 1.0}, 0.0, -1.0),  # NSR
    ],
)
def test_by_hand(options: dict[str, float], right: float, wrong: float) -> None:
    made = batches.without(MADE, 3)
    after = shaped(made, [WeightedReinforce(**options)]).advantages
    assert after[made.response_mask].tolist() == pytest.approx([right, right, wrong, wrong])
    assert after[3].tolist() == pytest.approx([0.7, 0.8])  # counted by nothing


def test_what_is_right_is_an_option() -> None:
    after = shaped(batches.without(MADE, 3), [WeightedReinforce(threshold=0.4)]).advantages
    assert after[:3, 0].tolist() == pytest.approx([0.1, -1.0, 0.1])


def spec(kind: str, **options: float) -> dict[str, Any]:
    return {"class_path": f"tre_lightning.methods.{kind}", "init_args": options}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.ppo.kl_coef": 0.1, "trainer.callbacks": [spec("WeightedReinforce")]},
            "model.ppo.kl_coef=0.1 is in the reward, which .* replaces; set model.ppo.kl_in",
        ),
        (
            {"trainer.callbacks": [spec("EntropyAdvantage"), spec("WeightedReinforce")]},
            r"replaces the advantages that EntropyAdvantage\[entropy_advantage\]",
        ),
    ],
)
def test_what_it_would_undo_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, refusal: runs.Said
) -> None:
    assert re.search(message, refusal(runs.run, tmp_path / "run", changes=changes))
    assert not (tmp_path / "run").exists()
