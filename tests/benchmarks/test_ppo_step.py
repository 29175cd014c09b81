"""Test of benchmarks/ppo_step.py: the lengths of its responses, and our side of a run."""

from dataclasses import replace
from pathlib import Path

import ppo_step
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ppo_step.SIZES["quick"]


def test_where_lengths_are_uneven_every_token_may_end_a_response_alike(tmp_path: Path) -> None:
    ppo_step.save_model(replace(QUICK, uneven=True), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(QUICK.vocabulary, (8, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits.softmax(-1)
    ending = probabilities[..., tokenizer.eos_token_id] * ppo_step.MEAN_LENGTH
    assert ending.min() > 0.9 and ending.max() < 1.1
    assert probabilities[..., tokenizer.pad_token_id].max() < 1e-12


def test_where_they_are_even_no_token_ends_a_response(tmp_path: Path) -> None:
    ppo_step.save_model(QUICK, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert min(tokenizer.eos_token_id, tokenizer.pad_token_id) >= QUICK.vocabulary
    config = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert config.eos_token_id is None and config.pad_token_id is None


def test_parts_lie_within_an_iteration(tmp_path: Path) -> None:
    ppo_step.save_model(QUICK, tmp_path)
    found = ppo_step.run_ours(ppo_step.PPO, QUICK, str(tmp_path), "cpu", iterations=2)
    (total,) = found["seconds"]
    (parts,) = found["parts"]
    assert 0 < parts["sampling"][0] + parts["update"][0] < total[0]
    assert found["words"] == pytest.approx(QUICK.new_tokens) and found["peak"] >= 0
