"""``layers`` in a configuration file: what it builds on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from tre_lightning.cli.config_files import with_layers
from tre_lightning.cli.main import PPOCLI, RewardCLI, main
from tre_lightning.methods import LossTerm

ENTROPY = "tre_lightning.methods.EntropyBonus"


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where the work would begin."""
    for command in (PPOCLI, RewardCLI):
        monkeypatch.setattr(command, "_run_subcommand", lambda self, subcommand: None)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def files(words: list[str]) -> list[Any]:
    """Every ``--config``: the name of a file, or the values of one as text."""
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(text).name if "\n" not in text else yaml.safe_load(text) for text in given]


def test_layers_come_first_in_order_and_depth_first(tmp_path: Path) -> None:
    """Each is relative to the file that names it, whatever the working directory."""
    write(tmp_path / "base.yaml", "a: 1")
    write(tmp_path / "task" / "inner.yaml", "b: 2")
    write(tmp_path / "task" / "math.yaml", "layers: [inner.yaml, ../base.yaml]\nc: 3")
    top = write(tmp_path / "sub" / "top.yaml", "layers: [../base.yaml, ../task/math.yaml]\nd: 4")
    expected = ["base.yaml", "inner.yaml", "base.yaml", {"c": 3}, {"d": 4}]
    for words in (["fit", "--config", top], ["fit", f"--config={top}"], ["fit", "-c", top]):
        found = with_layers([*words, "--x.y=1", "--z", "2"])
        assert files(found) == expected
        assert found[0] == "fit" and found[-3:] == ["--x.y=1", "--z", "2"]


def test_the_order_of_the_command_line_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "a: 1")
    top = write(tmp_path / "top.yaml", "layers: [base.yaml]\nb: 2")
    plain = write(tmp_path / "plain.yaml", "c: 3")
    words = ["fit", "--config", plain, "--a", "5", "--config", top, "--b=6"]
    found = with_layers(words)
    assert files(found) == ["plain.yaml", "base.yaml", {"b": 2}]
    assert found[2:4] == ["--a", "5"] and found[-1] == "--b=6"


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config"],
        ["fit", "--config={file}"],
        ["fit", "--config=no.yaml"],
        ["fit", "--config={{a: 1, layers: [x.yaml]}}"],
        ["fit", "--config.x", "--data", "--config=a: 1\nb: 2"],
    ],
)
def test_what_has_no_layers_is_left_to_the_parser(tmp_path: Path, words: list[str]) -> None:
    file = write(tmp_path / "broken.yaml", "layers: [")
    words = [word.format(file=file) for word in words]
    assert with_layers(words) == words


def test_values_reach_the_parser_as_they_stand(tmp_path: Path) -> None:
    """References are not resolved early, and text that looks like a number stays text."""
    write(tmp_path / "base.yaml", "{}")
    top = write(
        tmp_path / "top.yaml",
        "layers: [base.yaml]\na: ${trainer.x}\nb: '1e-6'\nc: 1.0e-6\nd: null\ncallbacks+: [e]",
    )
    text = with_layers(["--config", top])[-1].removeprefix("--config=")
    wanted = {"a": "${trainer.x}", "b": "1e-6", "c": 1e-6, "d": None, "callbacks+": ["e"]}
    assert yaml.safe_load(text) == wanted


@pytest.mark.parametrize(
    ("top", "other", "words"),
    [
        ("layers: [no.yaml]", "", ["top.yaml: layers names no.yaml", "no.yaml does not exist"]),
        ("layers: [top.yaml]", "", ["top.yaml: layers names top.yaml", "top.yaml itself"]),
        ("layers: [other.yaml]", "layers: [top.yaml]", ["other.yaml: layers names top.yaml"]),
        ("layers: [../dir/./other.yaml]", "layers: [top.yaml]", ["other.yaml: layers names top"]),
        ("layers: [other.yaml]", "layers: [no.yaml]", ["other.yaml: layers names no.yaml"]),
        ("layers: other.yaml", "", ["top.yaml: layers=other.yaml is no list"]),
        ("layers: [3]", "", ["top.yaml: layers=[3] is no list"]),
        ("layers: null", "", ["top.yaml: layers=None is no list"]),
        ("layers: [other.yaml]", "model: {polcy: 3}", ["model.polcy"]),
        ("layers: [other.yaml]\nmodel: {polcy: 3}", "", ["model.polcy"]),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path, refusal: runs.Said, top: str, other: str, words: list[str]
) -> None:
    write(tmp_path / "dir" / "other.yaml", other or "model: {seed: 1}")
    file = write(tmp_path / "dir" / "top.yaml", top)
    line = refusal(main, ["fit", "--config", file], alone=True)
    assert all(word in line for word in words), line


def layered(tmp_path: Path) -> tuple[list[str], str]:
    """The tiny run's words, and a file over its configuration."""
    words = runs.words(tmp_path / "run")
    base = Path(words[2])
    top = (
        f"layers: [../{base.name}, ../more.yaml]\n"
        "model: {optim: {lr: 0.02}}\n"
        "trainer: {max_epochs: 1}\n"
        "warm_start: {steps: 3, cache_dir: '${trainer.default_root_dir}_warm'}\n"
    )
    write(
        tmp_path / "more.yaml",
        "model: {optim: {lr: 0.5, critic_lr: 0.03}}\n"
        f"trainer: {{max_epochs: 7, callbacks+: [{{class_path: {ENTROPY}}}]}}",
    )
    file = write(tmp_path / "sub" / "top.yaml", top)
    return ["fit", "--config", file, *words[3:]], file


def terms(cli: Any) -> list[str]:
    return [term.name for term in cli.trainer.callbacks if isinstance(term, LossTerm)]


@pytest.mark.usefixtures("parsed_only")
def test_own_values_override_layers_and_later_ones_override_those(tmp_path: Path) -> None:
    words, _ = layered(tmp_path)
    cli = main(words)
    assert isinstance(cli, PPOCLI)
    optim = cli.model.optim_args
    assert (optim.lr, optim.critic_lr, cli.trainer.max_epochs) == (0.02, 0.03, 1)
    assert terms(cli) == ["tre", "entropy"]  # callbacks+ appends
    assert cli.warm_start is not None
    assert cli.warm_start.cache_dir == f"{tmp_path}/run_warm"

    later = "model: {optim: {lr: 0.7}}\n"
    again = "{class_path: %s, init_args: {name: again}}" % ENTROPY  # noqa: UP031
    file = write(tmp_path / "later.yaml", later + f"trainer: {{callbacks+: [{again}]}}")
    cli = main([*words, "--config", file, "--model.optim.critic_lr=0.9"])
    assert (cli.model.optim_args.lr, cli.model.optim_args.critic_lr) == (0.7, 0.9)
    assert terms(cli) == ["tre", "entropy", "again"]


def test_the_configuration_of_a_run_is_complete(tmp_path: Path, shown: runs.Said) -> None:
    """``config.yaml`` gives the same run again without the layers; so does --print_config."""
    words, file = layered(tmp_path)
    main(words)
    kept = tmp_path / "run" / "config.yaml"
    written = yaml.safe_load(kept.read_text())
    assert "layers" not in written and "config" not in written
    assert written["model"]["optim"]["lr"] == 0.02
    assert [spec["class_path"] for spec in written["trainer"]["callbacks"]] == [
        "tre_lightning.methods.TrustRegionEntropy",
        ENTROPY,
    ]

    for again in (words, ["fit", "--config", str(kept)]):
        printed = shown(main, [*again, "--print_config"])
        assert yaml.safe_load(printed) == yaml.safe_load(kept.read_text())

    Path(file).unlink()
    other = main(["fit", "--config", str(kept), f"--trainer.default_root_dir={tmp_path}/other"])
    assert terms(other) == ["tre", "entropy"]
    assert runs.distance(runs.weights(tmp_path / "run"), runs.weights(tmp_path / "other")) == 0.0


@pytest.mark.usefixtures("parsed_only")
def test_the_data_of_a_layer_say_what_is_trained(tmp_path: Path) -> None:
    """``fit`` trains a reward model where a layer names its pairs."""
    write(
        tmp_path / "pairs.yaml",
        "data: {class_path: tre_lightning.tasks.PreferencePairs}\n"
        "model: {policy: {architecture: {model_type: qwen3}}}",
    )
    top = write(
        tmp_path / "top.yaml", f"layers: [pairs.yaml]\nmodel: {{output_dir: {tmp_path}/model}}"
    )
    flags = [f"--trainer.default_root_dir={tmp_path}/run", "--trainer.accelerator=cpu"]
    assert isinstance(main(["fit", "--config", top, *flags]), RewardCLI)
