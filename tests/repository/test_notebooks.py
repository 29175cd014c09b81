"""The notebooks run as they stand, and are committed with their outputs.

That of a free T4 runs here with a tiny model and a few questions, and has no outputs to commit.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

import runs
import small_models
import tre_lightning
from tre_lightning.cli.checks import check_memory
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.training.memory_model import GIB, SHAPES, Device, Run, device_seconds, run_of

NOTEBOOKS = {file.stem: file for file in sorted((runs.ROOT / "notebooks").glob("*.ipynb"))}
ON_A_T4 = "colab_gpu"
WITH_OUTPUTS = [name for name in NOTEBOOKS if name != ON_A_T4]
MACHINE_PATH = re.compile(r"(?<![\w.])/(tmp|home|root|work|usr|opt|var|mnt)/|[A-Z]:\\\\")
# Runs before the first cell, so that another interpreter or package cannot pass unseen.
FIRST = f"""
import sys
import torch
import tre_lightning
assert sys.executable == {sys.executable!r}, sys.executable
assert tre_lightning.__file__ == {tre_lightning.__file__!r}, tre_lightning.__file__
torch.set_num_threads(1)
"""


def read(name: str) -> Any:
    return nbformat.read(str(NOTEBOOKS[name]), as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_readme_links_each_notebook() -> None:
    linked = re.findall(r"\(notebooks/(\w+)\.ipynb\)", (runs.ROOT / "README.md").read_text())
    assert len(linked) == 5 and set(linked) == set(NOTEBOOKS)


def execute(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the cells in a directory of the user's, in which they must leave nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebooks make their directories
    # A kernel of this very interpreter, whatever kernels the machine has.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_kernel_spec(str(tmp_path / "kernels" / "own"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    where = tmp_path / "cwd"
    where.mkdir()
    client = NotebookClient(
        notebook, kernel_name="own", timeout=600, resources={"metadata": {"path": str(where)}}
    )
    client.execute()
    assert list(where.iterdir()) == []  # nothing is left in the user's directory


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(name)
    committed = [bool(cell.outputs) for cell in code_cells(notebook)]
    execute(notebook, tmp_path, monkeypatch)
    shown = [bool(cell.outputs) for cell in code_cells(notebook)[1:]]
    # A cell whose trl is not installed shows nothing.
    assert all(kept or not now for now, kept in zip(shown, committed, strict=True))


def test_the_notebook_for_a_t4_runs_on_a_cpu_with_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    flags = {
        "trainer.accelerator": "cpu",
        "data.init_args.train_file": runs.write_jsonl(tmp_path / "train.jsonl", rows[:4]),
        "data.init_args.eval_file": runs.write_jsonl(tmp_path / "eval.jsonl", rows[4:]),
        "data.init_args.batch_size": 2,
        "data.init_args.iterations_per_epoch": 2,
        "model.rollout.num_responses": 4,
        "model.rollout.max_new_tokens": 6,
        "model.ppo.num_minibatches": 1,
    }
    own = {
        "MODEL": str(small_models.save(tmp_path / "model")),
        "RUN": str(tmp_path / "run"),
        "FLAGS": [f"--{name}={value}" for name, value in flags.items()],
    }
    notebook = read(ON_A_T4)
    (place,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    given = "\n".join(f"{name} = {value!r}" for name, value in own.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    execute(notebook, tmp_path, monkeypatch)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    printed = "".join(x.text for x in outputs if x.get("name") == "stdout")
    minutes = re.search(r"30 iterations (\d+) minutes, 3 validations (\d+) minutes", printed)
    assert minutes is not None and sum(map(int, minutes.groups())) < 50
    assert "nothing was kept" in printed and "ppo 4/4" in printed
    assert re.search(r"^val/pass@1 +(\d\.\d{3}(, |$)){3}", printed, re.MULTILINE)
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 3  # curves, two heat maps
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "model.zip").exists()


def test_the_run_for_a_t4_fits_it_and_is_the_one_that_is_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names: dict[str, Any] = {"CONFIGS": runs.CONFIGS, "SHAPES": SHAPES, "Device": Device}
    names |= {"Run": Run, "device_seconds": device_seconds}
    for cell in code_cells(read(ON_A_T4)):
        if cell.source.startswith(("REPOSITORY =", "layers =", "t4, shape =")):
            exec(cell.source, names)
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    cli: Any = main([*names["words"], "--trainer.accelerator=cpu"])
    config = cli.options.as_dict()
    assert config["trainer"]["precision"] == "32-true"
    assert not config["model"]["policy"]["lora"]["bfloat16_base"]
    run = run_of(config)
    assert run == replace(names["typical"], prompt_tokens=256, new_tokens=512)
    data, evaluation = config["data"]["init_args"], config["model"]["evaluation"]
    assert config["trainer"]["max_epochs"] * data["iterations_per_epoch"] == 30
    assert data["batch_size"] == 16 and run.rows == 128
    assert data["eval_split"] == "test[:128]" and 128 * evaluation["num_responses"] == 8 * run.rows
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=int(14.5 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    config["trainer"]["accelerator"] = "auto"
    check_memory(config)


def test_the_notebook_for_a_t4_has_no_outputs_and_says_so() -> None:
    notebook = read(ON_A_T4)
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(notebook))
    assert "**Not run on a T4 yet.**" in notebook.cells[0].source
    assert not MACHINE_PATH.search(NOTEBOOKS[ON_A_T4].read_text())


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_a_notebook_is_committed_with_its_outputs(name: str) -> None:
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = [output.output_type for output in outputs]
    assert "stream" in kinds and "error" not in kinds
    assert "stderr" not in [output.get("name") for output in outputs]  # no warnings
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not MACHINE_PATH.search(NOTEBOOKS[name].read_text())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    for link in links:
        assert (NOTEBOOKS[name].parent / link).exists(), link


def test_the_notebooks_are_small() -> None:
    assert sum(file.stat().st_size for file in NOTEBOOKS.values()) < 1_500_000
