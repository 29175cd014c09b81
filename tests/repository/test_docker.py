"""The Dockerfile against the files that it names; scripts/build_image.sh builds and runs it."""

import json
import re
import runpy
import shlex
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

import runs

DOCKERFILE = (runs.ROOT / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def steps() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile in order, on one line each."""
    kept = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    lines = "\n".join(kept).replace("\\\n", " ").splitlines()
    parts = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [(instruction, arguments) for instruction, arguments in parts]


def of(instruction: str) -> list[str]:
    """The arguments of every such instruction."""
    return [arguments for name, arguments in steps() if name == instruction]


def sources(arguments: str) -> list[str]:
    """What a COPY copies."""
    return [word for word in shlex.split(arguments) if not word.startswith("--")][:-1]


def in_context(path: str) -> bool:
    """Whether .dockerignore leaves ``path`` in: the last pattern that hits it or a parent holds."""
    parents = [path, *map(str, PurePosixPath(path).parents)][:-1]
    sent = True
    for line in (runs.ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or line.startswith("#"):
            continue
        if pattern.startswith("**/"):
            hit = any(fnmatch(PurePosixPath(name).name, pattern[3:]) for name in parents)
        else:
            hit = any(
                name.count("/") == pattern.count("/") and fnmatch(name, pattern) for name in parents
            )
        if hit:
            sent = line.startswith("!")
    return sent


def test_every_copied_path_exists_and_is_sent() -> None:
    copied = [source for arguments in of("COPY") for source in sources(arguments)]
    assert copied
    for source in copied:
        path = runs.ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        kept = [f for f in files if "__pycache__" not in f.parts]
        assert kept, source
        for file in kept:
            assert in_context(file.relative_to(runs.ROOT).as_posix()), file


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/x/model/model.safetensors",
        "tests/test_docker.py",
        ".env",
        "src/tre_lightning/__pycache__/cli.cpython-311.pyc",
    ],
)
def test_the_rest_stays_out_of_the_context(path: str) -> None:
    assert not in_context(path)


def test_what_the_package_is_built_from_is_copied_before_it_is_installed() -> None:
    order = steps()
    install = next(i for i, (_, a) in enumerate(order) if "--no-build-isolation" in a)
    copied = {s for name, a in order[:install] if name == "COPY" for s in sources(a)}
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert needed | {PurePosixPath(package).parts[0] for package in packages} <= copied


def test_a_change_of_the_source_does_not_install_the_dependencies_again() -> None:
    order = steps()
    dependencies = next(i for i, (_, a) in enumerate(order) if "requirements.txt" in a)
    before = {s for name, a in order[:dependencies] if name == "COPY" for s in sources(a)}
    assert before == {"pyproject.toml", "constraints.txt"}
    assert "-c /tmp/build/constraints.txt" in order[dependencies][1]


def test_the_extras_are_those_of_the_project() -> None:
    extras = re.findall(r'\["optional-dependencies"\]\["(\w+)"\]', DOCKERFILE)
    assert extras
    assert set(extras) <= PROJECT["optional-dependencies"].keys()


def test_the_labels_are_those_of_the_project() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE))
    assert labels["version"] == PROJECT["version"]
    assert labels["licenses"] == PROJECT["license"]
    assert PROJECT["description"].startswith(labels["description"])


def test_the_entrypoint_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (entrypoint,), (command,) = of("ENTRYPOINT"), of("CMD")
    python, flag, module = json.loads(entrypoint)
    assert (python, flag) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *json.loads(command)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 0
    assert "fit" in capsys.readouterr().out


def test_it_does_not_run_as_root_and_its_volumes_are_writable() -> None:
    (user,), (volumes,) = of("USER"), of("VOLUME")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    (made,) = re.findall(r"install -d -m 1777 ([^&]+)", DOCKERFILE)
    assert set(json.loads(volumes)) <= set(made.split())


def test_commands_of_the_docs_mount_the_volumes_and_use_shipped_configs() -> None:
    (volumes,) = of("VOLUME")
    pages = [runs.ROOT / "README.md", runs.ROOT / "docs" / "docker.md"]
    text = "\n".join([DOCKERFILE, *(page.read_text() for page in pages)]).replace("\\\n", " ")
    commands = re.findall(r"docker run .*", text)
    assert len(commands) > 2
    for command in commands:
        for mounted in re.findall(r'-v \S+:(/[^\s:"]+)', command):
            assert mounted in json.loads(volumes), command
        for config in re.findall(r"--config (\S+)", command):
            assert (runs.ROOT / config).is_file(), command
