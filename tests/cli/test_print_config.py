"""What --print_config prints is a configuration: given back, it prints the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import runs
from tre_lightning.cli.main import PPOCLI, main

PRINT = "--print_config"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        *((command, "countdown_tiny") for command in ("fit", "validate", "test", "predict")),
        ("reward fit", "reward/hh_tiny"),
        ("sft fit", None),
        ("fit", "experiment/math_1.5b"),  # built of layers
    ],
)
def test_it_can_be_given_back(
    command: str, file: str | None, tmp_path: Path, shown: runs.Said
) -> None:
    words = command.split()
    given = ["--config", f"{runs.CONFIGS}/{file}.yaml"] if file else []
    if file is None:  # what a warm start needs
        data = {"task": {"class_path": "tre_lightning.tasks.CountdownDataModule"}}
        sft = {"model": {"output_dir": str(tmp_path / "model")}, "data": {"init_args": data}}
        sft["data"]["class_path"] = "tre_lightning.tasks.demonstrations.Demonstrations"  # type: ignore[assignment]
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
        given = ["--config", str(tmp_path / "sft.yaml")]
    first = shown(main, [*words, *given, PRINT])
    assert "layers" not in yaml.safe_load(first)
    again = tmp_path / "again.yaml"
    again.write_text(first)
    assert shown(main, [*words, "--config", str(again), PRINT]) == first


def test_a_run_of_it_is_the_same_run(
    tmp_path: Path, shown: runs.Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = runs.words(tmp_path / "run")
    again = tmp_path / "again.yaml"
    again.write_text(shown(main, [*words, PRINT]))
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    first, second = main(words), main(["fit", "--config", str(again)])
    options = [cli.options.clone() for cli in (first, second)]  # type: ignore[attr-defined]
    for option in options:
        option.config = None
    assert options[0] == options[1]
    assert [type(c) for c in first.trainer.callbacks] == [type(c) for c in second.trainer.callbacks]


def test_a_shipped_task_is_known_by_its_bare_name() -> None:
    # In an interpreter of its own: here other tests have imported the task.
    words = [sys.executable, "-m", "tre_lightning", "fit", "--data=WalkDataModule", PRINT]
    printed = subprocess.check_output(words, text=True, timeout=120)
    assert yaml.safe_load(printed)["data"]["class_path"] == "tre_lightning.tasks.WalkDataModule"
