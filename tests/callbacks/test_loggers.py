"""Tests of tre_lightning.callbacks.loggers: what TensorBoard shows together, and other loggers."""

import csv
import math
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch.loggers.wandb
import pytest
from lightning_utilities.core.imports import RequirementCache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import runs
from tre_lightning.callbacks.loggers import LAYOUT

LAYERS = runs.CONFIGS / "logger"
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


# ----- other loggers than TensorBoard


def layer(name: str) -> str:
    return f"--config={LAYERS / name}.yaml"


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_what_tensorboard_has_and_goes_on(run_dir: Path, tmp_path: Path) -> None:
    csv_dir, flag = tmp_path / "run", "--model.evaluation.num_responses=4"
    printed = runs.output_of(
        csv_dir, layer("csv"), flag, changes={"checkpoint": {"keep_all": True}}
    )
    assert "tensorboard --logdir" not in printed and not list(csv_dir.glob("events.*"))
    assert sorted(path.name for path in csv_dir.iterdir()) == [
        *("checkpoints", "config.yaml", "metrics.csv", "model")
    ]
    scalars = runs.scalars(run_dir)
    written = {
        tag: [(int(row["step"]), float(row[tag])) for row in rows(csv_dir) if row[tag]]
        for tag in rows(csv_dir)[0]
    }
    assert written.keys() == scalars.keys() | {"step", *runs.CLOCKS}
    for tag, events in scalars.items():
        expected = [(step, pytest.approx(value, rel=1e-6, abs=1e-6)) for step, value in events]
        found = [(step, value) for step, value in written[tag] if not math.isnan(value)]
        assert found == expected, tag

    # A command beside the run has a folder of its own; a resumed run goes on in the same file.
    before = rows(csv_dir)
    runs.run(csv_dir, layer("csv"), flag, "--ckpt_path=last", command="validate")
    assert rows(csv_dir) == before and (csv_dir / "validate" / "metrics.csv").exists()
    from_third = f"--ckpt_path={csv_dir}/checkpoints/iteration=3.ckpt"
    runs.run(csv_dir, layer("csv"), flag, from_third)
    clocks = dict.fromkeys(runs.CLOCKS, "")
    assert [{**row, **clocks} for row in rows(csv_dir)] == [{**row, **clocks} for row in before]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_a_run_with_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "tensorboard --logdir" not in runs.output_of(tmp_path / "run", layer("wandb"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")
def test_a_run_with_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    runs.run(tmp_path / "run", layer("mlflow"))
    client = MlflowClient("sqlite:///mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("tre-lightning").experiment_id])
    assert found.info.run_name == str(tmp_path / "run") and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "rollout/score")
    assert [entry.step for entry in history] == list(range(runs.ITERATIONS))
    assert "rollout/pass1" in found.data.metrics  # MLflow's names have no @
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: runs.Said
) -> None:
    missing = RequirementCache("wandb>=9999")
    monkeypatch.setattr(lightning.pytorch.loggers.wandb, "_WANDB_AVAILABLE", missing)
    line = refusal(runs.run, tmp_path / "run", layer("wandb"))
    assert "WandbLogger" in line and "pip install -U 'wandb" in line
    assert not (tmp_path / "run").exists()
