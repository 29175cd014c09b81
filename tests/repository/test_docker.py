"""The Dockerfile against the files that it names; scripts/build_image.sh builds and runs it."""

import json
import re
import runpy
import shlex
import sys
import tomllib
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


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    copied = {source for arguments in of("COPY") for source in sources(arguments)}
    assert copied and all((runs.ROOT / source).exists() for source in copied)
    ignore = (runs.ROOT / ".dockerignore").read_text().splitlines()
    everything, *patterns = [line for line in ignore if not line.startswith("#")]
    sent = [pattern for pattern in patterns if pattern.startswith("!")]
    assert everything == "*" and {pattern[1:].strip("/") for pattern in sent} == {
        source.strip("/") for source in copied
    }
    # Of what is sent no more than caches is left out again.
    assert patterns[len(sent) :] == ["**/__pycache__", "**/*.py[cod]"]


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
    extras = re.findall(r'\*e\["(\w+)"\]', DOCKERFILE)
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
