"""The commands of the README, in their order, on a run shortened by a few flags."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from tre_lightning.cli.main import main

README = (runs.ROOT / "README.md").read_text()
SHORT = (
    "--warm_start.steps=2",
    "--warm_start.batch_size=8",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--data.init_args.iterations_per_epoch=1",
    "--data.init_args.batch_size=4",
    "--data.init_args.val_size=4",
    "--data.init_args.test_size=4",
)
FIRST_WORDS = {"make", ".", "python", "docker"}  # docker: test_docker.py


def commands(page: str = README) -> Iterator[list[str]]:
    """Every command of a page's blocks of shell, as words."""
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def of(*start: str) -> list[list[str]]:
    """What follows these words in the commands that start with them."""
    return [words[len(start) :] for words in commands() if words[: len(start)] == list(start)]


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert {words[0] for words in commands()} <= FIRST_WORDS
    assert len(of("python", "-m", "tre_lightning")) >= 5
    assert len(of("make")) >= 4


def test_commands_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")
    for words in of("python", "-m", "tre_lightning"):
        if words[-1] == "--help":
            with pytest.raises(SystemExit, match=r"^0$"):
                main(words)
            continue
        main([*words, *SHORT])
    assert (tmp_path / "runs" / "countdown_tiny" / "model" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "countdown_tiny" / "predictions.jsonl").exists()
    assert "test/pass@1" in capsys.readouterr().out


def test_a_method_is_added_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (runs.ROOT / "docs" / "add_a_method.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (layer,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (words,) = commands(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")
    (tmp_path / "my_methods.py").write_text(code)
    (tmp_path / "confidence.yaml").write_text(layer)
    cli = main([*words[3:], *SHORT, "--trainer.log_every_n_steps=1"])
    assert "loss/confidence" in runs.scalars(Path(cli.trainer.default_root_dir))


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.split()) <= 1200


def test_targets_of_make_exist() -> None:
    makefile = (runs.ROOT / "Makefile").read_text()
    for target, *_ in of("make"):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_files_that_it_names_exist() -> None:
    """Links, and files in commands and text, with ``{a,b}`` meaning one after the other."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    files = re.findall(r"\bconfigs/[\w./{},+-]*[\w}]", README)
    assert len(links) > 10 and len(files) > 5
    for file in [*links, *(one for name in files for one in alternatives(name))]:
        assert (runs.ROOT / file).exists(), file


def alternatives(name: str) -> list[str]:
    """``a/{b,c}.yaml`` -> ``a/b.yaml``, ``a/c.yaml``."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [f"{match[1]}{word}{match[3]}" for word in match[2].split(",")] if match else [name]


def test_extras_that_it_names_exist() -> None:
    pyproject = (runs.ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"tre-lightning\[(\w+)\]", README):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra
