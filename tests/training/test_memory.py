"""Gradient checkpointing and bfloat16: what they may change, and what not."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import runs
from batches import LOGPROBS_ALONE, one_response
from tre_lightning.batches import PromptBatch
from tre_lightning.cli.main import PPOCLI, main
from tre_lightning.policy.actor_critic import (
    ActorCritic,
    PolicyArgs,
    checkpoint_gradients,
    load_language_model,
    weight_type,
)
from tre_lightning.sampling.in_process import generate

IDS = torch.tensor([[5, 9, 3, 17, 30, 8]])

# ----- gradient checkpointing


def forward_calls(layer: nn.Module) -> list[int]:
    """A list that grows with every forward pass that enters the layer."""
    calls: list[int] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("on", [False, True])
def test_the_backward_pass_computes_activations_again(
    architecture: dict[str, Any], critic: Any, on: bool
) -> None:
    args = PolicyArgs(architecture=architecture, critic=critic, gradient_checkpointing=on)
    model = ActorCritic.load(args)
    nn.init.ones_(model.value_head.weight)
    trunks = [model.policy.base_model] + ([model.critic] if model.critic is not None else [])
    batch = one_response(IDS, 3)
    model.outputs(batch, LOGPROBS_ALONE)  # tries out the head
    calls = [forward_calls(layer.mlp) for trunk in trunks for layer in trunk.layers]
    outputs, values = model.outputs(batch, LOGPROBS_ALONE)
    assert [len(made) for made in calls] == [1] * len(calls)
    (outputs.logprobs.sum() + values.square().sum()).backward()
    assert [len(made) for made in calls] == [2 if on else 1] * len(calls)


def test_sampling_keeps_its_cache(
    any_policy: PreTrainedModel, make_prompts: Callable[[Sequence[int]], PromptBatch]
) -> None:
    def sampled() -> Tensor:
        return generate(
            any_policy,
            make_prompts([3, 6, 1]),
            num_responses=2,
            uniforms=torch.rand(6, 10, dtype=torch.float64, generator=torch.manual_seed(0)),
            eos_token_ids=[1],
            pad_token_id=0,
        ).response_ids

    expected = sampled()
    checkpoint_gradients(any_policy.train())
    assert torch.equal(sampled(), expected)
    assert all(module.training for module in any_policy.modules())
    any_policy.eval()
    assert torch.equal(sampled(), expected)
    assert not any(module.training for module in any_policy.modules())


LORA = {"rank": 2, "alpha": 16}


@pytest.mark.parametrize("lora", [None, LORA], ids=["", "lora"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_gradient_checkpointing_changes_no_weight(
    critic: str, lora: dict[str, int] | None, tmp_path: Path
) -> None:
    # Two layers, so that the second one's input is that of a layer with trained weights.
    architecture = {**runs.ARCHITECTURE, "num_hidden_layers": 2}
    policy = {"architecture": architecture, "critic": critic, "lora": lora}
    for on in ("false", "true"):
        flags = (f"--model.policy.gradient_checkpointing={on}", "--model.ppo.kl_coef=0.1")
        runs.run(tmp_path / on, *flags, changes={"model.policy": policy})
    assert runs.distance(runs.weights(tmp_path / "true"), runs.weights(tmp_path / "false")) == 0.0
    assert runs.scalars(tmp_path / "true") == runs.scalars(tmp_path / "false")


def test_a_model_that_cannot_is_refused(policy: PreTrainedModel) -> None:
    policy.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"model\.policy\.gradient_checkpointing=true: Llama"):
        checkpoint_gradients(policy)


# ----- bfloat16


@pytest.fixture
def bfloat16_dir(policy: PreTrainedModel, tmp_path: Path) -> Path:
    """A model directory as most of the hub."""
    policy.bfloat16().save_pretrained(tmp_path / "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    return tmp_path / "bfloat16"


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own_critic", [False, True])
def test_weights_are_loaded_in_the_trainers_type(
    bfloat16_dir: Path, default: torch.dtype, own_critic: bool
) -> None:
    critic = str(bfloat16_dir) if own_critic else None
    args = PolicyArgs(model=str(bfloat16_dir), critic_model=critic)
    torch.set_default_dtype(default)
    try:
        assert weight_type(args) == default
        model = ActorCritic.load(args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {default}


def test_a_new_model_is_of_that_type_too(architecture: dict[str, Any]) -> None:
    args = PolicyArgs(architecture={**architecture, "dtype": "bfloat16"})
    assert load_language_model(args).dtype == torch.float32


@pytest.mark.parametrize("lora", [None, LORA], ids=["", "lora"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_a_16_bit_run_goes_on_where_it_was(
    precision: str, dtype: torch.dtype, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    flag = f"--trainer.precision={precision}"
    lora = lora and {**lora, "bfloat16_base": True}
    changes = {
        "model.policy": {"architecture": runs.ARCHITECTURE, "lora": lora},
        "checkpoint": {"keep_all": True},
    }
    runs.run(tmp_path / "whole", flag, changes=changes)
    whole = runs.weights(tmp_path / "whole")
    assert {weight.dtype for weight in whole.values()} == {dtype}
    curves = runs.scalars(tmp_path / "whole")
    for tag in ("loss/total", "loss/value", "policy/grad_norm", "val/score"):
        assert curves[tag] and all(math.isfinite(value) for _, value in curves[tag]), tag
    assert all(value > 0.0 for _, value in curves["policy/grad_norm"])
    ckpt = f"--ckpt_path={tmp_path}/whole/checkpoints/iteration=1.ckpt"
    runs.run(tmp_path / "run", flag, ckpt, changes=changes)
    assert runs.distance(runs.weights(tmp_path / "run"), whole) == 0.0
    assert runs.scalars(tmp_path / "run")["loss/total"] == curves["loss/total"][1:]


# ----- the layers


@pytest.mark.parametrize("layer", sorted(p.name for p in (runs.CONFIGS / "memory").glob("*.yaml")))
def test_a_layer_goes_on_top_of_a_whole_configuration(
    layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(runs.CONFIGS.parent)
    files = ("task/countdown.yaml", "model/tiny.yaml", "method/tre_p.yaml", f"memory/{layer}")
    words = [word for file in files for word in ("--config", str(runs.CONFIGS / file))]
    run_dir = f"--trainer.default_root_dir={tmp_path}/run"
    cli = main(["fit", *words, run_dir, "--trainer.accelerator=cpu"])
    given = yaml.safe_load((runs.CONFIGS / "memory" / layer).read_text())
    found, policy = cli.model.policy_args, given.get("model", {}).get("policy", {})
    assert found.gradient_checkpointing == policy.get("gradient_checkpointing", False)
    assert found.cpu_offload == policy.get("cpu_offload", False)
    assert (None if found.lora is None else vars(found.lora)) == policy.get("lora")
    precision = given.get("trainer", {}).get("precision", "32-true")
    assert cli.trainer.precision == precision
    assert found.model is not None  # the layers below are still there
