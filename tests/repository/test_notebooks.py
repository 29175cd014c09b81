"""The notebooks run as they stand, and are committed with their outputs."""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

import runs
import tre_lightning

NOTEBOOKS = {file.stem: file for file in sorted((runs.ROOT / "notebooks").glob("*.ipynb"))}
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
    assert len(linked) == 4 and set(linked) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebooks make their directories
    # A kernel of this very interpreter, whatever kernels the machine has.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_kernel_spec(str(tmp_path / "kernels" / "own"))
    notebook = read(name)
    committed = [bool(cell.outputs) for cell in code_cells(notebook)]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    where = tmp_path / "cwd"
    where.mkdir()
    client = NotebookClient(
        notebook, kernel_name="own", timeout=600, resources={"metadata": {"path": str(where)}}
    )
    client.execute()
    shown = [bool(cell.outputs) for cell in code_cells(notebook)[1:]]
    # A cell whose trl is not installed shows nothing.
    assert all(kept or not now for now, kept in zip(shown, committed, strict=True))
    assert list(where.iterdir()) == []  # nothing is left in the user's directory


@pytest.mark.parametrize("name", NOTEBOOKS)
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
