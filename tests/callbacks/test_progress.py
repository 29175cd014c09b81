"""What a run shows while it goes on."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

import runs
from tre_lightning.callbacks.progress import _numbers


def shown(**values: float) -> str:
    tags = {tag.replace("__", "/").replace("_at_", "@"): v for tag, v in values.items()}
    metrics = {tag: torch.tensor(value) for tag, value in tags.items()}
    return _numbers(SimpleNamespace(callback_metrics=metrics))  # type: ignore[arg-type]


def test_pass_at_1_stands_beside_another_score_only() -> None:
    assert shown(rollout__score=0.5, rollout__pass_at_1=0.5) == "score 0.500"
    assert shown(rollout__score=0.5, rollout__pass_at_1=0.25) == "score 0.500 pass@1 0.250"
    assert shown(val__score=0.5, val__pass_at_1=0.25) == "val 0.250"
    assert shown(val__score=0.5) == "val 0.500"


def test_seconds_are_those_of_the_iteration() -> None:
    assert shown(rollout__seconds=1.5, policy__update_seconds=0.75) == "2.2 s"
    assert shown(rollout__seconds=1.5) == ""


def test_lines_where_the_output_is_no_terminal(tmp_path: Path) -> None:
    printed = runs.output_of(tmp_path / "run", "--trainer.max_epochs=2", "--progress.lines=2")
    lines = [line for line in printed.splitlines() if line.startswith("ppo ")]
    numbers = r"score 0\.\d{3} entropy \d\.\d\d tail \S+ kl \S+ length \d\.\d .*\d\.\d s"
    for number, line in zip((1, 2, 4), lines, strict=True):
        assert re.fullmatch(rf"ppo {number}/4  eta 0:\d\d:\d\d  {numbers}", line), line
