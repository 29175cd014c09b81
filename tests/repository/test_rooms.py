"""What each room of the package may import, and the public names."""

import ast
import doctest
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from inspect import getmodule
from io import StringIO
from typing import Any

import pytest

import runs
import tre_lightning

SOURCE = runs.ROOT / "src" / "tre_lightning"
# From the bottom up; a room imports itself and these. CONTRIBUTING.md says why.
ROOMS = {
    "common": set[str](),
    "entropy": set[str](),
    "batches": {"common"},
    "ops": {"entropy"},
    "policy": {"entropy", "ops", "batches", "common"},
    "tasks": {"batches", "policy.tokenizers", "policy.chat", "policy.encoding", "common"},
    "sampling": {"policy", "batches", "common"},
    "methods": {"entropy", "ops", "batches", "common"},
    "training": {"entropy", "ops", "batches", "policy", "sampling", "methods", "common"},
    "callbacks": {"entropy", "ops", "batches", "policy", "sampling", "methods", "training"}
    | {"tasks", "common"},
}
# Supervised training is of a task's data; PPO knows no task.
ALSO = {"training.sft": {"tasks"}, "training.reward_model": {"tasks.alignment"}}


def imports() -> Iterator[tuple[str, str]]:
    """Module and what it imports of the package, without the package's name."""
    for file in SOURCE.rglob("*.py"):
        module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            of = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in node.names:
                package, _, imported = f"{of}{name.name}".partition(".")
                if package == "tre_lightning":
                    yield module, imported


def test_rooms_import_only_what_lies_below_them() -> None:
    seen = set()
    for module, imported in imports():
        room = module.partition(".")[0]
        if room not in ROOMS:
            continue
        seen.add(room)
        allowed = {room, *ROOMS[room], *ALSO.get(module, ())}
        assert any(f"{imported}.".startswith(f"{name}.") for name in allowed), (module, imported)
    assert seen >= ROOMS.keys() - {"entropy"}  # the paper's file needs nothing of ours


def test_every_file_is_in_a_room() -> None:
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__main__", "__pycache__", "py"} == {*ROOMS, "cli", "compare"}


def test_public_names_are_those_that_are_listed() -> None:
    for name in tre_lightning.__all__:
        assert getattr(tre_lightning, name) is not None
    assert dir(tre_lightning) == sorted(tre_lightning.__all__)
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = tre_lightning.nothing_of_ours


@pytest.mark.parametrize("name", sorted({*tre_lightning.__all__} - {"__version__"}))
def test_the_example_of_a_public_name_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public = getattr(tre_lightning, name)
    names: dict[str, Any] = dict(vars(getmodule(public) or sys.modules[__name__]))

    def quietly(words: list[str]) -> Any:
        with redirect_stdout(StringIO()):
            return tre_lightning.main(words)

    names["main"] = quietly
    monkeypatch.chdir(runs.ROOT)
    (example,) = [
        found
        for found in doctest.DocTestFinder(recurse=False).find(public, name, globs=names)
        if found.examples
    ]
    assert doctest.DocTestRunner().run(example).failed == 0
