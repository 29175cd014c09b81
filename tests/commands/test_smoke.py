"""The shipped examples, from the command line to the exported model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
from tre_lightning.cli.main import main
from tre_lightning.tasks.alignment.scorer import RewardModelScorer

EXAMPLES = ("countdown_tiny", "math_tiny", "hh_tiny")
SHORT_REWARD = ("--trainer.max_epochs=1", "--data.init_args.synthetic_size=1024")
SHORT = (
    "--warm_start.steps=20",
    "--warm_start.batch_size=32",
    "--trainer.max_epochs=1",
    "--data.init_args.iterations_per_epoch=3",
    "--data.init_args.batch_size=16",
    "--data.init_args.val_size=16",
    "--data.init_args.test_size=16",
    "--model.optim.warmup_iterations=0",
)


def train(name: str, tmp_path: Path, short: bool) -> tuple[Path, list[str]]:
    """Run an example and, for alignment, the reward model before it.

    Returns:
        Its directory, and the flags for another command on it.
    """
    run_dir = tmp_path / name
    words = [f"--config={runs.CONFIGS / name}.yaml", f"--trainer.default_root_dir={run_dir}"]
    words.append(f"--warm_start.cache_dir={tmp_path / 'warm_starts'}")
    if name == "hh_tiny":
        reward = [f"--config={runs.CONFIGS}/reward/hh_tiny.yaml"]
        reward += [f"--trainer.default_root_dir={tmp_path / 'reward'}"]
        main(["reward", "fit", *reward, *cpu(SHORT_REWARD if short else ())])
        words.append(f"--data.init_args.reward.model={tmp_path / 'reward' / 'model'}")
    words += cpu(SHORT if short else ())
    main(["fit", *words])
    return run_dir, words


def cpu(flags: Sequence[str]) -> list[str]:
    """The same on any machine."""
    return [*flags, "--trainer.accelerator=cpu", "--trainer.devices=1"]


def predictions(run_dir: Path, words: list[str]) -> list[dict[str, Any]]:
    """What the command predict writes."""
    main(["predict", *words, "--ckpt_path=last"])
    file = run_dir / "predictions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_short_run_of_an_example(name: str, tmp_path: Path) -> None:
    run_dir, words = train(name, tmp_path, short=True)
    scalars = runs.scalars(run_dir)
    assert [step for step, _ in scalars["val/score"]] == [0, 2]
    assert [step for step, _ in scalars["rollout/score"]] == [0, 1, 2]
    assert [value for _, value in scalars["rollout/unscorable_fraction"]] == [0.0, 0.0, 0.0]

    trained = runs.weights(run_dir)
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    head = policy.lm_head.weight
    assert torch.equal(head, trained["actor_critic.policy.lm_head.weight"])
    (start,) = (tmp_path / "warm_starts").glob("*/model")
    assert not torch.equal(head, AutoModelForCausalLM.from_pretrained(start).lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(run_dir / "model")) > 3

    if name == "hh_tiny":  # the scores are those of the reward model that was trained before
        records = predictions(run_dir, words)
        pairs = [(record["prompt"], text) for record in records for text in record["responses"]]
        prompts, responses = zip(*pairs, strict=True)
        scorer = RewardModelScorer(str(tmp_path / "reward" / "model"))
        expected = scorer.score(prompts, responses)
        scores = [score for record in records for score in record["scores"]]
        assert scores == pytest.approx(expected, abs=1e-4)
        assert len(set(expected)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rise"), [("countdown_tiny", 0.1), ("math_tiny", 0.05), ("hh_tiny", 1.0)]
)
def test_an_example_learns(name: str, rise: float, tmp_path: Path) -> None:
    run_dir, _ = train(name, tmp_path, short=False)
    held_out = [value for _, value in runs.scalars(run_dir)["val/score"]]
    assert held_out[-1] > held_out[0] + rise
    sampled = [value for _, value in runs.scalars(run_dir)["rollout/score"]]
    assert sum(sampled[-10:]) / 10 > sum(sampled[:10]) / 10 + rise / 2
