"""Reading: a token has one log-probability, however its row is read."""

import copy
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import runs
from tre_lightning.batches import PromptBatch, Rollout, sequence_inputs
from tre_lightning.common.errors import Refused
from tre_lightning.policy.actor_critic import ActorCritic, PolicyArgs, load_language_model
from tre_lightning.policy.head import HeadOptions, label_logprobs
from tre_lightning.policy.reading import reading, trunk_of
from tre_lightning.sampling.in_process import generate

MakePrompts = Callable[[Sequence[int]], PromptBatch]
ARGS = PolicyArgs(model="m")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
OLD = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
BERT = {"num_attention_heads": 2, "max_position_embeddings": 64, "is_decoder": True}


def build(model_type: str, **options: Any) -> PreTrainedModel:
    """With weights so large that what a model reads shows in what it says."""
    architecture = {**SIZES, **options, "model_type": model_type}
    torch.manual_seed(0)
    model = load_language_model(PolicyArgs(architecture=architecture))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "emb" in name else 1.2 / parameter.shape[-1] ** 0.5)
    return model


def tried(policy: PreTrainedModel, critic: Any = "separate", **options: Any) -> ActorCritic:
    """With a value head that shows what it reads."""
    args = PolicyArgs(model="m", critic=critic, **options)
    model = ActorCritic.build(args, policy, None)
    if model.value_head is not None:
        nn.init.normal_(model.value_head.weight, generator=torch.manual_seed(1))
    model.try_out(args)
    return model


# ----- one number for a token, wherever it is computed


def assert_one_number(model: ActorCritic, prompts: PromptBatch) -> None:
    """Log-probabilities as sampled, of both kinds of training pass, and of each row by itself."""
    rollout = generate(
        model.policy,
        prompts,
        num_responses=2,
        uniforms=torch.rand(2 * len(prompts), 10, generator=torch.manual_seed(0)).double(),
        eos_token_ids=[1],
        pad_token_id=0,
        sample_batch_size=4,
    )
    ids, mask = sequence_inputs(rollout)
    counted = rollout.response_mask
    sampled = rollout.behaviour_logprobs[counted]
    close = {"atol": 2e-4, "rtol": 2e-4}
    alone, states = [], []
    trunk = trunk_of(model.policy)
    for row, real, length in zip(ids, mask, counted.sum(1).tolist(), strict=True):
        tokens = row[real].unsqueeze(0)
        with torch.no_grad():
            logits = model.policy(input_ids=tokens, use_cache=False).logits[0, -length - 1 : -1]
            hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state
        alone.append(label_logprobs(logits, tokens[0, -length:]))
        states.append(model.value_head(hidden[0, -length - 1 : -1])[:, 0])
    torch.testing.assert_close(sampled, torch.cat(alone), **close)
    for takes_hidden in (True, False):
        asked = HeadOptions((), 1.0, 2**20, show_logits=not takes_hidden)
        outputs, values = model.outputs(rollout, asked)
        torch.testing.assert_close(outputs.logprobs, sampled, **close)
        torch.testing.assert_close(values[counted], torch.cat(states), **close)


CACHED = {
    "bloom": {"n_layer": 2, "n_head": 2},  # positions from the mask
    "falcon_h1": {**ATTENTION, **MAMBA, "mamba_d_ssm": 32},
    "gemma2": {**ATTENTION, "head_dim": 8, "sliding_window": 4},  # capped logits
    "gpt2": OLD,
    "gpt_neox": ATTENTION,
    "jamba": {**ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {**ATTENTION, **EXPERTS, "head_dim": 8, "intermediate_size_mlp": 32},
    "mamba": {"state_size": 4, "time_step_rank": 4},  # cache_params
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "mistral": {**ATTENTION, "sliding_window": 4},
    "mixtral": {**ATTENTION, **EXPERTS},
    "opt": {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 8},  # a width of its own
    "phimoe": {**ATTENTION, **EXPERTS, "router_jitter_noise": 0.1},
    "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},
}
WHOLE = {  # a mask changes nothing, or positions begin elsewhere
    "recurrent_gemma": {**ATTENTION, "num_hidden_layers": 3, "attention_window_size": 4},
    "rwkv": {"rescale_every": 0},
    "roberta": BERT,
}


@pytest.mark.parametrize("model_type", [*CACHED, *WHOLE])
def test_a_token_has_one_logprob_however_it_is_read(
    model_type: str, make_prompts: MakePrompts, caplog: pytest.LogCaptureFixture
) -> None:
    policy = build(model_type, **(CACHED | WHOLE)[model_type])
    with caplog.at_level(logging.WARNING):
        model = tried(policy)
    assert reading(policy).cached == (model_type in CACHED)
    assert ("costs a pass over its whole row" in caplog.text) == (model_type in WHOLE)
    assert_one_number(model, make_prompts([3, 9, 1]))


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("bert", {**BERT, "is_decoder": False}, "is no causal language model"),
        ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2}, "is no causal language model"),
        # It counts tokens that are not the one of padding, and takes them for the length.
        ("xlm", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "causal": True}, "no causal language"),
        ("rwkv", {"rescale_every": 1}, "changes its weights in a forward pass"),
    ],
)
def test_what_cannot_be_read_is_refused(
    model_type: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refused, match=rf"model\.policy\.model=m: .*{reason}.*; give another model"):
        tried(build(model_type, **options))


def test_a_trial_leaves_nothing_behind(any_policy: PreTrainedModel) -> None:
    weights = copy.deepcopy(any_policy.state_dict())
    modes = [part.training for part in any_policy.modules()]
    state = torch.get_rng_state()
    reading(any_policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in any_policy.modules()] == modes
    assert all(torch.equal(part, weights[name]) for name, part in any_policy.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_is_no_difference(any_policy: PreTrainedModel, dtype: torch.dtype) -> None:
    found = reading(any_policy.to(dtype))
    assert found.padded and found.cached


class Forgetful(nn.Module):
    """A layer that reads right in one pass, and drops the past where it is read step by step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        out = self.inner(hidden_states=hidden_states, **kwargs)
        return (out[0] * (hidden_states.shape[1] > 1), *out[1:])


def test_a_cache_that_lies_is_not_used(policy: PreTrainedModel, make_prompts: MakePrompts) -> None:
    for layer in policy.model.layers:
        layer.self_attn = Forgetful(layer.self_attn)
    model = tried(policy)
    assert reading(policy).padded and not reading(policy).cached
    assert_one_number(model, make_prompts([3, 9, 2]))


def test_a_critic_of_another_width_than_it_says_is_refused(policy: PreTrainedModel) -> None:
    model = ActorCritic(policy, copy.deepcopy(policy.model))
    model.value_head = nn.Linear(8, 1)
    with pytest.raises(Refused, match=r"critic_model=c: .*have 16 numbers, not 8"):
        model.try_out(PolicyArgs(model="m", critic_model="c"))


# ----- no noise


NOISY = {
    "phimoe": {**CACHED["phimoe"], "input_jitter_noise": 0.5},
    "mixtral": {**CACHED["mixtral"], "router_jitter_noise": 0.5},
    "opt": {**CACHED["opt"], "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "gpt2": {**OLD, "resid_pdrop": 0.5},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", NOISY)
def test_a_training_pass_is_that_of_evaluation(model_type: str, checkpointing: bool) -> None:
    policy = build(model_type, **NOISY[model_type])
    model = tried(policy, gradient_checkpointing=checkpointing).train()
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)

    batch = Rollout(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:], mask[:, 0])
    asked = HeadOptions((), 1.0, 2**20, show_logits=True)

    def run() -> tuple[Tensor, Tensor]:
        outputs, values = model.outputs(batch, asked)
        return outputs.logits, values

    first, second, third = run(), run(), [part.detach() for part in model.eval() and run()]
    for logits, values in (second, third):
        torch.testing.assert_close((logits, values), tuple(first), atol=0.0, rtol=0.0)


def test_noise_of_a_part_that_nobody_knows_is_off(policy: PreTrainedModel) -> None:
    class Noisy(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.training * torch.randn_like(hidden)

    policy.model.norm = nn.Sequential(policy.model.norm, Noisy())
    model = tried(policy).train()
    assert model.training and not policy.training
    policy.train()  # by somebody else
    with pytest.raises(Refused, match="draws random numbers in a training pass"):
        model.try_out(ARGS)


def test_only_layers_that_checkpoint_are_in_training_mode(policy: PreTrainedModel) -> None:
    model = tried(policy, gradient_checkpointing=True)
    layers = [*policy.model.layers, *model.critic.layers]
    training = {part for part in model.modules() if part.training}
    assert training == {model, model.value_head, *layers}
    assert not any(part.training for part in model.eval().modules())
    assert {part for part in model.train().modules() if part.training} == training


# ----- whole runs


@pytest.mark.parametrize("model_type", ["mamba", "phimoe", "rwkv"])
def test_a_run_without_updates_stays_where_it_is(model_type: str, tmp_path: Path) -> None:
    architecture = {
        **{name: value for name, value in SIZES.items() if "token" not in name},
        **(CACHED | WHOLE)[model_type],
        "model_type": model_type,
        "vocab_size": 48,
    }
    changes = {"model.policy": {"architecture": architecture}, "warm_start.lr": 0.5}
    still = ("--model.optim.lr=1e-12", "--trainer.max_epochs=1")
    runs.run(tmp_path / "run", *still, changes=changes)
    curves = runs.scalars(tmp_path / "run")
    for tag in ("rollout/engine_kl", "policy/approx_kl"):
        assert [value for _, value in curves[tag]] == pytest.approx([0.0] * 2, abs=1e-6), tag


def test_a_model_that_cannot_be_read_is_refused_before_its_warm_start(
    tmp_path: Path, refusal: runs.Said
) -> None:
    architecture = {**SIZES, **BERT, "model_type": "bert", "vocab_size": 48, "is_decoder": False}
    line = refusal(
        runs.run, tmp_path / "run", changes={"model.policy": {"architecture": architecture}}
    )
    named = r"error: model\.policy\.architecture\.model_type=bert: .*no causal language model"
    assert re.match(named, line)


def test_a_model_that_cannot_be_built_is_refused_in_one_line(
    tmp_path: Path, refusal: runs.Said
) -> None:
    architecture = {**runs.ARCHITECTURE, "pad_token_id": 48}
    line = refusal(
        runs.run, tmp_path / "run", changes={"model.policy": {"architecture": architecture}}
    )
    assert re.match(r"error: model\.policy\.architecture\.model_type=llama cannot be built", line)
    assert not (tmp_path / "run").exists()
