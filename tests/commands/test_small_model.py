"""A tiny random model by SmolLM2's rules on the way of configs/smollm2.yaml, and the real one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import small_models
from tre_lightning.callbacks import checkpoint, inspection
from tre_lightning.callbacks.heat_map import Sample
from tre_lightning.cli.main import main

CONFIG = runs.CONFIGS / "smollm2.yaml"
REAL = runs.ROOT / "runs" / "models" / "smollm2"
SHORT = (
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--data.init_args.batch_size=2",
    "--data.init_args.iterations_per_epoch=2",
    "--data.init_args.val_size=2",
    "--data.init_args.test_size=2",
    "--model.rollout.num_responses=2",
    "--model.rollout.max_new_tokens=6",
    "--model.ppo.num_minibatches=1",
)


def words(model: Path, run_dir: Path, *flags: str, command: str = "fit") -> list[str]:
    paths = [f"--model.policy.model={model}", f"--trainer.default_root_dir={run_dir}"]
    return [command, f"--config={CONFIG}", *paths, *flags]


def test_it_is_trained_resumed_tested_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Sample] = []

    def keep(samples: Sequence[Sample], vocabulary: int) -> Any:
        assert vocabulary == small_models.VOCABULARY
        drawn.extend(samples)
        return original(samples, vocabulary)

    original = inspection.heat_map
    monkeypatch.setattr(inspection, "heat_map", keep)
    monkeypatch.setattr(checkpoint, "_LARGE", 0)  # as the real one is
    start, run_dir = small_models.save(tmp_path / "start"), tmp_path / "run"
    main(words(start, run_dir, *SHORT))
    printed = capsys.readouterr().out
    assert "response tokens/s, peak memory" in printed and "val/pass@1" in printed
    files = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert "last.ckpt" in files and "previous.ckpt" not in files
    assert runs.saved_iteration(run_dir) == 4
    # No system message where there is to be none, and titles without the template.
    ((_, text), *_) = runs.texts(run_dir, "val/samples")
    assert "<|im_start|>user" in text and small_models.DEFAULT_SYSTEM not in text
    assert drawn and all("?" in sample.title for sample in drawn)
    assert not any("<|im_" in sample.title for sample in drawn)

    resumed = main(words(start, run_dir, *SHORT, "--trainer.max_epochs=3", "--ckpt_path=last"))
    assert resumed.model.iteration == runs.saved_iteration(run_dir) == 6
    main(words(start, run_dir, *SHORT, "--ckpt_path=last", command="test"))
    assert "test/pass@1" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    trained = runs.weights(run_dir)["actor_critic.policy.model.embed_tokens.weight"]
    assert torch.equal(exported.lm_head.weight, trained)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert tokenizer.chat_template == small_models.TEMPLATE
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_warm_start_changes_a_pretrained_model_little(tmp_path: Path) -> None:
    start = small_models.save(tmp_path / "start")
    flags = [*SHORT, "--trainer.max_epochs=1", "--warm_start.steps=2", "--warm_start.batch_size=2"]
    main(words(start, tmp_path / "run", *flags, f"--warm_start.cache_dir={tmp_path}/warm"))
    (warm,) = (tmp_path / "warm").glob("*/model")
    before = small_models.model().model.embed_tokens.weight
    moved = AutoModelForCausalLM.from_pretrained(warm).model.embed_tokens.weight - before
    assert 0.0 < float(moved.detach().abs().max()) < 2 * 2e-5 + 1e-7  # two steps of AdamW


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="make runs/models/smollm2")
def test_the_real_model_learns(tmp_path: Path) -> None:
    main(words(REAL, tmp_path / "run", "--trainer.accelerator=cpu", "--trainer.devices=1"))
    held_out = [value for _, value in runs.scalars(tmp_path / "run")["val/pass@1"]]
    assert held_out[-1] > held_out[0] + 0.2
