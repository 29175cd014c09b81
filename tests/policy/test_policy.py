"""Tests of tre_lightning.policy.actor_critic."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from batches import one_response
from tre_lightning.batches import PromptBatch, Rollout, sequence_inputs
from tre_lightning.entropy import full_entropy
from tre_lightning.ops import Region
from tre_lightning.policy.actor_critic import (
    ActorCritic,
    PolicyArgs,
    head_input,
    load_language_model,
    parameter_shapes,
)
from tre_lightning.policy.head import HeadOptions, label_logprobs
from tre_lightning.policy.reading import before
from tre_lightning.policy.tokenizers import end_tokens, load_tokenizer, word_tokenizer
from tre_lightning.sampling.in_process import generate
from tre_lightning.training.losses import spread

PROMPTS, RESPONSES = [3, 6, 1], [4, 2, 1]


@pytest.fixture
def rollout(make_prompts: Callable[[Sequence[int]], PromptBatch]) -> Rollout:
    """Prompts of 3, 6 and 1 tokens, responses of 4, 2 and 1."""
    prompts = make_prompts(PROMPTS)
    mask = torch.arange(4) < torch.tensor(RESPONSES).unsqueeze(1)
    ids = torch.randint(3, 50, mask.shape, generator=torch.manual_seed(0)) * mask
    finished = torch.tensor([False, True, True])
    return Rollout(prompts.prompt_ids, prompts.prompt_mask, ids, mask, finished)


def unpadded(rollout: Rollout, row: int) -> Tensor:
    """Prompt and response of a row, ``[1, P + T]``."""
    prompt = rollout.prompt_ids[row, rollout.prompt_mask[row]]
    response = rollout.response_ids[row, rollout.response_mask[row]]
    return torch.cat([prompt, response]).unsqueeze(0)


def actor_critic(policy: PreTrainedModel, kind: str) -> ActorCritic:
    """With a value head that shows what it reads."""
    model = ActorCritic(policy, copy.deepcopy(policy.base_model) if kind == "separate" else None)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.value_head.weight)
    torch.nn.init.normal_(model.value_head.bias)
    return model


def run(
    model: ActorCritic, ids: Tensor, mask: Tensor, length: int, takes_hidden: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ``[B, length, 2]``, and values, of the last ``length`` tokens."""
    batch = one_response(ids, length, mask)
    asked = HeadOptions((Region(),), 1.0, 2**20, show_logits=not takes_hidden)
    assert asked.takes_hidden == takes_hidden
    outputs, values = model.outputs(batch, asked)
    return spread(
        numbers(outputs.logprobs, outputs.entropy(Region()).region), batch.response_mask
    ), values


def numbers(logprobs: Tensor, entropies: Tensor) -> Tensor:
    """Both side by side, ``[n, 2]``."""
    return torch.stack([logprobs, entropies], -1)


# --- forward ---


@pytest.mark.parametrize("takes_hidden", [True, False])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_logits_and_values_are_those_of_each_row_alone(
    any_policy: PreTrainedModel, rollout: Rollout, kind: str, takes_hidden: bool
) -> None:
    model = actor_critic(any_policy, kind)
    ids, mask = sequence_inputs(rollout)
    found, values = run(model, ids, mask, 4, takes_hidden)
    assert found.shape == (3, 4, 2)
    assert values.shape == (3, 4) and values.dtype == torch.float32
    for row, (p, t) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = unpadded(rollout, row)
        # The model's own output at each response token's predecessor.
        logits = any_policy(alone).logits[0, p - 1 : p + t - 1]
        expected = numbers(label_logprobs(logits, alone[0, p:]), full_entropy(logits))
        hidden = any_policy.base_model(alone).last_hidden_state[0, p - 1 : p + t - 1]
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(found[row, :t], expected, **close)
        torch.testing.assert_close(values[row, :t], model.value_head(hidden)[:, 0], **close)
        short = run(model, alone, torch.ones_like(alone, dtype=torch.bool), t, takes_hidden)
        torch.testing.assert_close(found[row, :t], short[0][0], **close)
        torch.testing.assert_close(values[row, :t], short[1][0], **close)


@pytest.mark.parametrize("takes_hidden", [True, False])
def test_only_counted_tokens_reach_the_head(
    policy: PreTrainedModel, rollout: Rollout, takes_hidden: bool
) -> None:
    model = ActorCritic(policy, None)
    every, _ = run(model, *sequence_inputs(rollout), 4, takes_hidden)
    outputs, _ = model.outputs(rollout, HeadOptions((), 1.0, 2**20, show_logits=not takes_hidden))
    counted = rollout.response_mask
    assert (outputs.logits is None) == takes_hidden
    assert takes_hidden or outputs.logits.shape == (sum(RESPONSES), 50)
    assert outputs.logprobs.shape == (sum(RESPONSES),)
    torch.testing.assert_close(outputs.logprobs, every[counted][:, 0])


def test_what_stands_before_a_counted_token_predicts_it() -> None:
    counted = torch.tensor([[True, True, False], [True, False, False]])
    assert before(counted, 2).int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_sequence_inputs_put_the_response_behind_the_prompt(rollout: Rollout) -> None:
    ids, mask = sequence_inputs(rollout)
    assert ids.shape == mask.shape == (3, 10) and mask.dtype == torch.bool
    for row in range(3):
        assert torch.equal(ids[row, mask[row]], unpadded(rollout, row)[0])


def test_sampled_tokens_are_likely_under_forward(
    any_policy: PreTrainedModel, make_prompts: Callable[[Sequence[int]], PromptBatch]
) -> None:
    # With the cache and without it, the policy is the same: greedy tokens are forward's favourites.
    rollout = generate(
        any_policy,
        make_prompts([2, 5]),
        num_responses=2,
        uniforms=torch.full((4, 8), 0.5, dtype=torch.float64),
        eos_token_ids=[1],
        pad_token_id=0,
        temperature=1e-5,
    )
    ids, mask = sequence_inputs(rollout)
    counted = rollout.response_mask
    source, _ = head_input(any_policy, None, ids, mask, counted)
    assert torch.equal(source.argmax(-1), rollout.response_ids[counted])


# --- critic ---


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_the_critic_starts_at_0(architecture: dict[str, Any], rollout: Rollout, kind: Any) -> None:
    model = ActorCritic.load(PolicyArgs(architecture=architecture, critic=kind))
    assert (model.critic is None) == (kind == "shared")
    _, values = run(model, *sequence_inputs(rollout), 4)
    assert torch.equal(values, torch.zeros(3, 4))


def test_a_separate_critic_does_not_follow_the_policy(
    architecture: dict[str, Any], rollout: Rollout
) -> None:
    separate = ActorCritic.load(PolicyArgs(architecture=architecture))
    shared = ActorCritic.load(PolicyArgs(architecture=architecture, critic="shared"))
    for model, follows in ((separate, False), (shared, True)):
        torch.nn.init.ones_(model.value_head.weight)
        before = run(model, *sequence_inputs(rollout), 4)[1]
        with torch.no_grad():
            for parameter in model.policy.parameters():
                parameter.normal_()
        after = run(model, *sequence_inputs(rollout), 4)[1]
        assert torch.equal(before, after) != follows


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_policy_and_critic_share_out_the_parameters(
    architecture: dict[str, Any], rollout: Rollout, kind: Any
) -> None:
    model = ActorCritic.load(PolicyArgs(architecture=architecture, critic=kind))
    torch.nn.init.ones_(model.value_head.weight)
    ours = {id(p) for p in model.policy_parameters()}
    theirs = {id(p) for p in model.critic_parameters()}
    assert not ours & theirs
    assert ours | theirs == {id(p) for p in model.parameters()}
    # The loss of the values reaches the critic's parameters, and the policy's in a shared trunk.
    _, values = run(model, *sequence_inputs(rollout), 4)
    values.square().sum().backward()
    assert model.value_head.weight.grad.any()
    assert any(p.grad is not None for p in model.policy_parameters()) == (kind == "shared")


def test_without_a_critic_there_is_the_policy_alone(
    architecture: dict[str, Any], rollout: Rollout
) -> None:
    without, with_critic = (
        ActorCritic.load(PolicyArgs(architecture=architecture, critic=critic))
        for critic in ("none", "separate")
    )
    shapes = parameter_shapes(with_critic)
    ours = {name: shape for name, shape in shapes.items() if name.startswith("policy.")}
    assert parameter_shapes(without) == ours and len(ours) < len(shapes)
    assert without.critic_parameters() == []
    assert len(without.policy_parameters()) == len(with_critic.policy_parameters())
    with_critic.policy.load_state_dict(without.policy.state_dict())
    logits, values = run(without, *sequence_inputs(rollout), 4)
    assert values is None
    assert torch.equal(logits, run(with_critic, *sequence_inputs(rollout), 4)[0])


def test_the_critic_may_start_from_a_model_of_its_own(
    architecture: dict[str, Any], model_dir: Path, rollout: Rollout
) -> None:
    torch.manual_seed(5)
    args = PolicyArgs(architecture=architecture, critic_model=str(model_dir))
    model = ActorCritic.load(args)
    torch.nn.init.ones_(model.value_head.weight)
    stored = AutoModelForCausalLM.from_pretrained(model_dir)
    ids, mask = sequence_inputs(rollout)
    _, values = run(model, ids, mask, 4)
    hidden = stored.base_model(unpadded(rollout, 0)).last_hidden_state[0, 2:6]
    torch.testing.assert_close(values[0], hidden.sum(-1), atol=1e-4, rtol=1e-4)


def test_a_critic_of_another_width_fits(architecture: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = load_language_model(PolicyArgs(architecture={**architecture, "hidden_size": 32}))
    wide.save_pretrained(tmp_path)
    model = ActorCritic.load(PolicyArgs(architecture=architecture, critic_model=str(tmp_path)))
    ids = torch.full((2, 5), 3)
    _, values = run(model, ids, torch.ones_like(ids, dtype=torch.bool), 2)
    assert values.shape == (2, 2)


def test_the_value_head_has_the_policys_type(policy: PreTrainedModel, rollout: Rollout) -> None:
    model = ActorCritic(policy.to(torch.bfloat16), None)
    assert model.value_head.weight.dtype == torch.bfloat16
    assert run(model, *sequence_inputs(rollout), 4)[1].dtype == torch.float32


# --- loading and saving ---


@pytest.mark.parametrize(
    "dropout",
    [
        {"model_type": "gpt2", "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        {"model_type": "llama", "attention_dropout": 0.5},  # a number, not a module
    ],
    ids=["gpt2", "llama"],
)
@pytest.mark.parametrize("critic", ["separate", "shared", "critic_model"])
def test_training_carries_no_dropout_noise(
    dropout: dict[str, Any], critic: str, architectures: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    architecture = architectures[dropout["model_type"]] | dropout
    kind: Any = "shared" if critic == "shared" else "separate"
    args = PolicyArgs(architecture=architecture, critic=kind)
    if critic == "critic_model":
        load_language_model(args).save_pretrained(tmp_path)
        args = replace(args, critic_model=str(tmp_path))
    model = ActorCritic.load(args).train()
    torch.nn.init.normal_(model.value_head.weight)
    ids = torch.arange(20).view(2, 10)
    first, second = (run(model, ids, torch.ones_like(ids, dtype=torch.bool), 4) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_saved_policy_loads_with_plain_transformers(
    any_policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        for parameter in any_policy.parameters():
            parameter.mul_(1.25)
    ActorCritic(any_policy, None).save_pretrained(tmp_path / "model", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = unpadded(rollout, 0)
    expected = any_policy.eval()(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert reloaded("w0 w5 never")["input_ids"] == [3, 8, 2]
    assert reloaded.decode([3, 8, 1], skip_special_tokens=True) == "w0 w5"
    ours = ActorCritic.load(PolicyArgs(model=str(tmp_path / "model")))
    assert torch.equal(ours.policy(ids).logits, expected)
    assert parameter_shapes(ours.policy) == parameter_shapes(any_policy)


def test_parameter_shapes_by_name() -> None:
    assert parameter_shapes(torch.nn.Linear(3, 2)) == {"weight": [2, 3], "bias": [2]}


# --- tokenizer ---


def words(*names: str, vocab_size: int = 10, model_type: str = "llama") -> PreTrainedTokenizerBase:
    return word_tokenizer(names, AutoConfig.for_model(model_type, vocab_size=vocab_size))


def test_a_loaded_tokenizer_pads_on_the_left(tmp_path: Path) -> None:
    right = words("a", "b")
    right.padding_side = "right"
    right.save_pretrained(tmp_path)
    encoded = load_tokenizer(str(tmp_path))(["a", "b a b"], padding=True)
    assert encoded["input_ids"] == [[0, 0, 3], [4, 3, 4]]
    assert encoded["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token(tmp_path: Path) -> None:
    bare = words("a")
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 1


def test_a_word_tokenizer_fills_the_models_vocabulary() -> None:
    tokenizer = words("a", "<x>", "a", "12", vocab_size=8)
    assert len(tokenizer) == tokenizer.vocab_size == 8
    ids = tokenizer("12 a  <x>\n1 <unused1>")["input_ids"]
    assert ids == [5, 3, 4, 2, 7]  # 1 is no word of its own
    assert len(words("a", "b", vocab_size=5)) == 5
    with pytest.raises(ValueError, match=r"vocab_size=4 is too small for the task's 5 words"):
        words("a", "b", vocab_size=4)


def test_a_model_type_that_replaces_the_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model_type=qwen2 .* use another"):
        words("a", "10", model_type="qwen2")


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [1]), (1, [1]), (7, [1, 7]), ([9, 1, 7], [1, 7, 9])]
)
def test_end_tokens_are_the_models_and_the_tokenizers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configured: int | list[int] | None,
    expected: list[int],
) -> None:
    policy.generation_config.eos_token_id = configured
    assert end_tokens(policy, tokenizer) == expected


# --- PolicyArgs ---


def test_an_architecture_needs_a_model_type() -> None:
    with pytest.raises(ValueError, match=r"policy\.architecture needs a model_type.*hidden_size"):
        PolicyArgs(architecture={"hidden_size": 16})


@pytest.mark.parametrize("critic", ["shared", "none"])
def test_only_a_separate_critic_has_a_model_of_its_own(critic: Any) -> None:
    message = rf"policy\.critic_model=some/model needs model\.policy\.critic=separate, not {critic}"
    with pytest.raises(ValueError, match=message):
        PolicyArgs(model="m", critic=critic, critic_model="some/model")


@pytest.mark.parametrize("critic", [None, False])  # YAML's null and no
def test_no_critic_is_the_word_none(critic: Any) -> None:
    message = rf"policy\.critic={critic} must be one of the words separate, shared, none"
    with pytest.raises(ValueError, match=message):
        PolicyArgs(critic=critic)


@pytest.mark.parametrize("both", [False, True])
def test_exactly_one_of_model_and_architecture(architecture: dict[str, Any], both: bool) -> None:
    args = PolicyArgs(model="m", architecture=architecture) if both else PolicyArgs()
    with pytest.raises(ValueError, match=r"exactly one of model\.policy\.model"):
        ActorCritic.load(args)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type"):
        ActorCritic.load(PolicyArgs(model=str(tmp_path)))


def test_the_tokenizer_comes_from_the_model_unless_named() -> None:
    assert PolicyArgs(model="m").tokenizer_source == "m"
    assert PolicyArgs(model="m", tokenizer="t").tokenizer_source == "t"
    assert PolicyArgs().tokenizer_source is None


def test_the_architecture_is_not_used_up(architecture: dict[str, Any]) -> None:
    args = PolicyArgs(architecture=architecture)
    load_language_model(args)
    assert load_language_model(args).config.hidden_size == 16
