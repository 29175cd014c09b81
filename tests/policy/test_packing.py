"""Packed rows: what models say of them, and its gradients, are those of plain rows."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reading import ATTENTION, CACHED, EXPERTS, OLD, WHOLE, build, tried
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import runs
from tre_lightning.batches import Rollout
from tre_lightning.ops import PolicyOutputs, Region
from tre_lightning.policy import reading as readings
from tre_lightning.policy.actor_critic import ActorCritic
from tre_lightning.policy.head import HeadOptions
from tre_lightning.policy.lora import LoraArgs
from tre_lightning.policy.packing import Packed
from tre_lightning.policy.reading import before, reading, trunk_of

PACKED = {
    "gemma3_text": {**ATTENTION, "head_dim": 8, "sliding_window": 3},  # in some layers
    "gpt2": OLD,
    "llama": ATTENTION,
    "llama4_text": {**CACHED["llama4_text"], "attention_chunk_size": 4},  # sees its chunk alone
    "mistral": {**ATTENTION, "sliding_window": 3},
    "opt": CACHED["opt"],
    "qwen3_moe": {
        **ATTENTION,
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
    },
}
PLAIN = {  # tokens look at those beside them, or attention is of the model's own making
    **{name: CACHED[name] for name in ("bloom", "falcon_h1", "jamba", "lfm2", "mamba")},
    "gpt_oss": {**ATTENTION, **EXPERTS, "head_dim": 8},
    **WHOLE,
}


def rollout() -> Rollout:
    """Two prompts of unequal length, and 2, 3 and 1 responses; one does not count at all."""
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2:5, :3] = False
    prompts = torch.arange(3, 24).view(3, 7)[torch.tensor([0, 0, 1, 1, 1, 2])]
    counted = torch.arange(9) < torch.tensor([[4], [9], [1], [0], [6], [3]])
    responses = torch.randint(3, 50, counted.shape, generator=torch.manual_seed(0))
    return Rollout(prompts * mask, mask, responses * counted, counted, counted[:, 0])


def unpacked(model: ActorCritic) -> ActorCritic:
    """A copy of which each row is read by itself."""
    other = copy.deepcopy(model)
    for part in filter(None, (other.policy, trunk_of(other.policy), other.critic)):
        vars(part)["_reading"] = replace(reading(part), packed=False)
    return other


def loss(model: ActorCritic, batch: Rollout) -> Tensor:
    """Of all that the head and the critic say."""
    region = Region(top_p=0.9)
    weights = torch.arange(int(batch.response_mask.sum())).cos()

    def losses(rows: slice, outputs: PolicyOutputs) -> Tensor:
        said = outputs.logprobs + outputs.entropy(region).region
        return (said * weights[rows]).unsqueeze(0)

    found, values = model.loss(batch, HeadOptions((region,), 1.0, 2**20), losses)
    return (
        found.total if values is None else found.total + (values.cos() * batch.response_mask).sum()
    )


def assert_as_unpacked(model: ActorCritic, batch: Rollout) -> None:
    """The loss and the gradient of every parameter."""
    other = unpacked(model)
    assert model.packs and not other.packs
    found, expected = (loss(each, batch) for each in (model, other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        size = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * (1 + size), rtol=1e-4)


def computed(model: ActorCritic, batch: Rollout) -> int:
    """Tokens whose embeddings a pass looks up in the policy."""
    seen: list[int] = []
    embeddings = model.policy.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, args, output: seen.append(args[0].numel()))
    loss(model, batch)
    hook.remove()
    return sum(seen)


# --- the layout ---


def test_a_common_prompt_is_there_once() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 6, 7, 8], [0, 2, 3, 4, 5], [1, 2, 9, 0, 0]])
    mask = ids > 0
    packed = Packed.of(ids, mask, before(mask[:, 2:], 2), 2)
    # Row by row, without the last token of each: nothing is asked after it.
    assert packed.ids.tolist() == [1, 2, 3, 4, 6, 7, 2, 3, 4]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2]
    blocks = [block.tolist() for block in packed.blocks]
    blocks[0][2].pop()  # behind the third row
    assert blocks == [[[0, 1, 2, 3], [0, 1, 4, 5], [6, 7, 8]], [[0, 1]]]
    places = torch.cat([block.flatten() for block in packed.blocks])
    assert places[packed.homes].tolist() == list(range(9))
    assert packed.asked.tolist() == [1, 2, 3, 1, 4, 5, 6, 7, 8, 1]


def test_what_no_row_counts_is_not_computed() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask, counted = torch.ones_like(ids) > 0, torch.tensor([[True, False], [False, False]])
    assert Packed.of(ids, mask, before(counted, 2), 2).ids.tolist() == [1, 2]


def test_a_token_of_padding_may_be_one_of_the_text() -> None:
    ids = torch.tensor([[0, 2, 3], [0, 2, 3]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    packed = Packed.of(ids, mask, before(mask[:, 2:], 2), 2)
    assert packed.ids.tolist() == [0, 2, 2] and packed.positions.tolist() == [0, 1, 0]


# --- equal outputs and gradients ---


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("model_type", PACKED)
def test_loss_and_gradients_are_those_of_plain_rows(model_type: str, critic: str) -> None:
    assert_as_unpacked(tried(build(model_type, **PACKED[model_type]), critic), rollout())


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"lora": LoraArgs(rank=2)}])
def test_so_are_they_with_options(model_type: str, options: dict[str, Any]) -> None:
    model = tried(build(model_type, **PACKED[model_type]), "separate", **options)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.manual_seed(3))
    assert_as_unpacked(model, rollout())


def test_in_float64_they_are_equal_to_its_rounding() -> None:
    model = tried(build("gpt2", **OLD).double(), "none")  # a value is float32, as Llama's norms are
    other, gradients = unpacked(model), []
    for each in (model, other):
        loss(each, rollout()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.policy.parameters()]))
    size = gradients[1].abs().max()
    torch.testing.assert_close(*gradients, atol=float(size) * 1e-12, rtol=0.0)


def test_the_logits_are_those_of_plain_rows(policy: PreTrainedModel) -> None:
    model = tried(policy, "none")
    asked = HeadOptions((), 1.0, 2**20, show_logits=True)
    found, expected = (m.outputs(rollout(), asked)[0].logits for m in (model, unpacked(model)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_it_computes_no_padding_and_each_prompt_once(policy: PreTrainedModel) -> None:
    model = tried(policy, "none")
    # Prompts of 7, 4 and 7 tokens; of each response all but its last token.
    assert computed(model, rollout()) == 7 + (3 + 8) + 4 + (0 + 5) + 7 + 2
    assert computed(unpacked(model), rollout()) == 6 * 16


def test_rows_of_which_no_token_counts_are_computed_too(policy: PreTrainedModel) -> None:
    model, batch = tried(policy, "shared"), rollout().uncounted()
    found = loss(model, batch)  # ranks need each other equally often
    found.backward()
    assert found == 0.0 and all(not p.grad.any() for p in model.policy.model.parameters())


# --- models that cannot, and what is left behind ---


@pytest.mark.parametrize("model_type", PLAIN)
def test_other_models_read_plain_rows(model_type: str) -> None:
    assert not tried(build(model_type, **PLAIN[model_type]), "separate").packs


class Neighbours(nn.Module):
    """A layer in which a token sees the one beside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = torch.cat([hidden[:, :1], hidden[:, 1:] + hidden[:, :-1]], dim=1)
        return self.inner(hidden)


class Detached(nn.Module):
    """A layer whose gradient is lost where there is one row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.detach() if len(hidden) == 1 else hidden)


@pytest.mark.parametrize("kind", [Neighbours, Detached])
def test_a_part_that_does_otherwise_is_found_out(
    policy: PreTrainedModel, kind: type[nn.Module]
) -> None:
    policy.model.layers[0].mlp = kind(policy.model.layers[0].mlp)
    assert not reading(policy).packed


def test_recomputing_otherwise_is_found_out(policy: PreTrainedModel) -> None:
    model = tried(policy, "none", gradient_checkpointing=True)
    assert model.packs
    for part in policy.modules():
        if hasattr(part, "_gradient_checkpointing_func"):
            part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    vars(policy).pop("_reading")
    assert not reading(policy).packed


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(policy: PreTrainedModel, fails: bool) -> None:
    model = tried(policy, "none")
    ids = torch.tensor([[5, 9, 3, 17]])
    expected = policy(input_ids=ids).logits
    if fails:
        policy.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss(model, rollout())
        policy.model.norm._forward_hooks.clear()
    else:
        loss(model, rollout())
    assert policy.config._attn_implementation == "sdpa"
    assert torch.equal(policy(input_ids=ids).logits, expected)


# --- whole runs ---


@pytest.mark.parametrize("by", ["response", "prompt"])
def test_a_run_is_that_of_plain_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    flags = (f"--model.ppo.minibatches_by={by}", "--model.ppo.kl_coef=0.1")

    def curves(name: str) -> dict[str, list[tuple[int, float]]]:
        runs.run(tmp_path / name, *flags)
        return runs.scalars(tmp_path / name)

    packed = curves("packed")
    monkeypatch.setattr(readings, "can_pack", lambda model: False)
    plain = curves("plain")
    other = {*runs.CLOCKS, "policy/padding_fraction", "policy/evaluation_padding_fraction"}
    for tag in plain.keys() - other:
        assert dict(packed[tag]) == pytest.approx(dict(plain[tag]), abs=1e-4, rel=1e-3), tag
    assert all(value == 0.0 for _, value in packed["policy/padding_fraction"])
    assert any(value > 0.0 for _, value in plain["policy/padding_fraction"])


def test_minibatches_by_prompt_need_a_prompt_each(tmp_path: Path, refusal: runs.Said) -> None:
    flags = ("--model.ppo.minibatches_by=prompt", "--model.ppo.num_minibatches=5")
    line = refusal(runs.run, tmp_path / "run", *flags)
    assert "model.ppo.num_minibatches=5 is too many for data.batch_size=4 prompts" in line
