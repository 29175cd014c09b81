"""Tests of tre_lightning.loggers: what TensorBoard shows together."""

import re
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import runs
from tre_lightning.loggers import LAYOUT

NOT_DRAWN = {"epoch"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    runs.run(directory, "--model.evaluation.num_responses=4")
    return directory


def test_a_run_writes_the_layout(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    written = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
    assert written == LAYOUT


def test_every_chart_shows_a_curve_and_no_curve_stands_twice(run_dir: Path) -> None:
    tags = [tag for tag in runs.scalars(run_dir) if tag not in NOT_DRAWN]
    shown: Counter[str] = Counter()
    for group, charts in LAYOUT.items():
        for chart, patterns in charts.items():
            # TensorBoard matches from the start of a tag, and wherever the pattern ends.
            found = {tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)}
            assert found, (group, chart)
            shown.update(found)
    assert set(shown.values()) == {1}
    assert shown["rollout/pass@1"] == shown["val/pass@4"] == shown["val/majority@4"] == 1
    assert shown["loss/tre"] == 1 and shown["loss/tre_coef"] == 0
