"""Recipes for cards of some size, the estimate of memory, and the dry run."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import runs
from tre_lightning.cli.checks import check_memory
from tre_lightning.cli.dry_run import shape_of
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.training.memory_model import (
    GIB,
    MIB,
    SHAPES,
    Model,
    Run,
    peak_bytes,
    run_of,
    shown,
    state_bytes,
)

RECIPES = sorted((runs.CONFIGS / "recipes").glob("*.yaml"))
METHOD = runs.CONFIGS / "method" / "tre_p.yaml"
TINY = Model(layers=2, hidden=4, intermediate=8, heads=2, key_value_heads=1, vocabulary=10)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_card_and_says_by_how_much(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = file.read_text().partition("layers:")[0]
    run = run_of(runs.merged(file))
    assert f"GiB: {shown(run)}." in header
    page = (runs.ROOT / "docs" / "scaling.md").read_text()
    parts = " | ".join(re.findall(r"[\d.]+\d", shown(run)))
    assert re.search(
        rf"\({re.escape(f'../configs/recipes/{file.name}')}\) \| .* GB \| {parts} \|", page
    )
    (count, size) = re.findall(r"# Run on: (one|4) cards? of (\d+) GB", header)[0]
    assert peak_bytes(run)["peak"] < 0.8 * 1e9 * int(size)  # a fifth is for what is not counted
    assert run.devices == (1 if count == "one" else 4)
    assert f"fit --config configs/recipes/{file.name} --config configs/method/" in header
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    words = ["fit", "--config", str(file), "--config", str(METHOD), "--trainer.accelerator=cpu"]
    cli = main(words)
    assert run_of(cli.options.as_dict()) == run  # type: ignore[attr-defined]


def test_there_is_a_recipe_for_every_card() -> None:
    sizes = {re.findall(r"Run on: (.*?) of (\d+ GB)", f.read_text())[0] for f in RECIPES}
    assert sizes == {("one card", f"{n} GB") for n in (16, 24, 80)} | {("4 cards", "24 GB")}


def test_the_states_of_a_run_by_hand() -> None:
    # A layer: queries and output 2 x 4 x 4, keys and values 2 x 4 x 2, MLP 3 x 4 x 8.
    layer, table = 32 + 16 + 96, 40
    run = Run(TINY, rows=1, micro_rows=1, prompt_tokens=3, new_tokens=5, critic="none")
    assert sum(state_bytes(run).values()) == 16 * (2 * layer + 2 * table)
    both = Run(TINY, rows=1, micro_rows=1, prompt_tokens=3, new_tokens=5)
    assert sum(state_bytes(both).values()) == 16 * (4 * layer + 3 * table)
    # Adapters of rank 1: q 4+4, k and v 4+2, o 4+4, gate, up and down 4+8, of two layers, twice.
    adapters = Run(TINY, 1, 1, 3, 5, lora_rank=1, mixed=True)
    trained = 2 * 2 * (8 + 6 + 6 + 8 + 36)
    assert sum(state_bytes(adapters).values()) == 16 * trained + 2 * (2 * layer + 2 * table)


def test_the_estimate_with_adapters_is_near_what_was_measured() -> None:
    """docs/scaling.md: 1,405 and 1,235 MiB in two runs."""
    model = Model(10, 512, 1536, 8, 4, 8192, normed_heads=True)
    run = Run(model, rows=32, micro_rows=8, prompt_tokens=16, new_tokens=48, lora_rank=16)
    assert (
        1.0 < 1235 / (peak_bytes(run)["peak"] / MIB) < 1405 / (peak_bytes(run)["peak"] / MIB) < 1.2
    )


def test_the_shapes_are_those_of_the_published_configurations() -> None:
    small = SHAPES["Qwen/Qwen2.5-0.5B-Instruct"]
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=24,
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    assert shape_of(config) == small
    billions = {name: shape.policy / 1e9 for name, shape in SHAPES.items()}
    assert list(billions.values()) == pytest.approx([0.494, 1.54, 7.62, 72.7], rel=0.005)
    assert shape_of(AutoConfig.for_model("gpt2")) is None


def with_a_gpu(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def test_a_card_that_is_too_small_is_refused_before_any_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = runs.merged(runs.CONFIGS / "recipes" / "countdown_0.5b_24gb.yaml")
    config["trainer"]["accelerator"] = "auto"
    with_a_gpu(monkeypatch, 15.0)
    with pytest.raises(ValueError) as refused:
        check_memory(config)
    said = str(refused.value)
    assert said.startswith("model.policy.model=Qwen/Qwen2.5-0.5B-Instruct needs about 17.4 GiB")
    assert shown(run_of(config)) in said and "this GPU has 15.0 GiB" in said
    assert "lower model.rollout.sample_batch_size" in said and "\n" not in said
    for change in (
        {"trainer.accelerator": "cpu"},
        {"model.policy.model": "mine/model"},
        {"model.policy.cpu_offload": True},
    ):
        changed = runs.merged(runs.CONFIGS / "recipes" / "countdown_0.5b_24gb.yaml")
        changed["trainer"]["accelerator"] = "auto"
        for key, value in change.items():
            owner, _, name = key.rpartition(".")
            runs.value_at(changed, owner)[name] = value
        check_memory(changed)
    with_a_gpu(monkeypatch, 23.0)
    check_memory(config)


def test_a_dry_run_says_what_the_whole_run_takes_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = runs.words(tmp_path / "run")
    cli: Any = main([*words, "--dry_run=true", "--trainer.max_epochs=3"])
    said = capsys.readouterr().out
    assert cli.model.iteration == 1 and cli.datamodule.batch_size == 2
    data = cli.whole["data"]["init_args"]
    iterations = 3 * data["iterations_per_epoch"]
    assert "dry run      one iteration of 2 prompts; nothing was kept" in said
    assert re.search(r"memory +\d\.\d GiB measured, libraries included; \d\.\d GiB est", said)
    assert re.search(r"whole run +states \d\.\d, sampling .*GiB a device, estimated", said)
    assert re.search(rf"at most about \d+ s an iteration, \d\.\d hours for {iterations}, ", said)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        ([], 2),
        (["--trainer.devices=4"], 4),
        (["--model.ppo.num_minibatches=32"], 4),  # of 4 prompts x 8 responses
        (["--model.ppo.num_minibatches=4", "--model.ppo.minibatches_by=prompt"], 4),
        (["--data.init_args.batch_size=1"], 1),
    ],
)
def test_a_dry_run_has_as_many_prompts_as_it_needs(
    flags: list[str], prompts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    words = ["fit", f"--config={runs.CONFIGS}/countdown_tiny.yaml", "--dry_run=true", *flags]
    cli: Any = main([*words, "--trainer.accelerator=cpu"])
    assert cli.datamodule.batch_size == cli.datamodule.eval_batch_size == prompts


def test_a_dry_run_is_of_fit_alone(tmp_path: Path, refusal: runs.Said) -> None:
    words = ["validate", *runs.words(tmp_path / "run")[1:]]
    assert "dry_run=true is of fit, not of validate" in refusal(main, [*words, "--dry_run=true"])
