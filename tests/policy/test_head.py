"""Tests of tre_lightning.policy.head."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tre_lightning.entropy import entropy_stats, full_entropy, trust_region_entropy
from tre_lightning.methods.hooks import PolicyOutputs
from tre_lightning.ops import Region
from tre_lightning.policy.actor_critic import PolicyArgs, head_input, load_language_model
from tre_lightning.policy.head import HeadOptions, head_loss, head_outputs, plain_head

REGIONS = (Region(), Region(top_k=3), Region(top_k=1), Region(top_p=0.9), Region(min_p=0.4))
MEMORY = 4 * 50 * 8  # four rows of the fixtures' vocabulary in float64
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


# --- which heads are plain ---


@pytest.fixture
def build(architecture: dict[str, Any]) -> Callable[..., PreTrainedModel]:
    """A small model of any type; token 0 is a token like others unless ``pad_token_id`` is 0."""

    def make(model_type: str, **options: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        options = {"pad_token_id": 7, "bos_token_id": 1, "eos_token_id": 1} | options
        return load_language_model(
            PolicyArgs(architecture=architecture | {"model_type": model_type} | options)
        )

    return make


def test_the_linear_head_is_found(any_policy: PreTrainedModel) -> None:
    head = any_policy.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert plain_head(any_policy) is head
    assert plain_head(any_policy.bfloat16()) is head
    assert plain_head(any_policy.double()) is head


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_may_have_a_bias(policy: PreTrainedModel, bias: bool) -> None:
    policy.set_output_embeddings(nn.Linear(16, 50, bias=bias))
    assert plain_head(policy) is policy.lm_head


@pytest.mark.parametrize(
    ("model_type", "changed", "same"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}),
        # So high a cap that it does not change small logits by a single bit.
        (
            "gemma2",
            {"final_logit_softcapping": 2.0**14, "initializer_range": 0.02},
            {"final_logit_softcapping": None},
        ),
        ("granite", {"logits_scaling": 4.0}, {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 0.0625}, {"logit_scale": 1.0}),
    ],
)
def test_a_head_with_changed_logits_is_not_plain(
    build: Callable[..., PreTrainedModel],
    model_type: str,
    changed: dict[str, Any],
    same: dict[str, Any],
) -> None:
    size = {"head_dim": 8} if model_type == "gemma2" else {}
    assert plain_head(build(model_type, **size, **changed)) is None
    model = build(model_type, **size, **same)
    assert plain_head(model) is model.get_output_embeddings()


# The embedding of the pad token starts as zeros, and so do its hidden states and logits, which no
# cap and no scale changes.
@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_a_head_is_tried_out_on_logits_that_are_not_0(
    build: Callable[..., PreTrainedModel], model_type: str, changed: dict[str, Any]
) -> None:
    assert plain_head(build(model_type, **changed, pad_token_id=0)) is None


class TwoLayers(nn.Module):
    """A head that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 50))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


class Capped(nn.Linear):
    """A linear layer and more."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).tanh()


@pytest.mark.parametrize("head", [TwoLayers(), Capped(16, 50)])
def test_a_head_of_another_kind_is_not_plain(policy: PreTrainedModel, head: nn.Module) -> None:
    policy.set_output_embeddings(head)
    assert plain_head(policy) is None


def test_a_head_that_does_not_read_the_last_hidden_states_is_not_plain(
    policy: PreTrainedModel,
) -> None:
    policy.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
    assert plain_head(policy) is None


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_trying_out_leaves_nothing_behind(any_policy: PreTrainedModel) -> None:
    any_policy.train()
    weights = copy.deepcopy(any_policy.state_dict())
    ids = torch.tensor([[5, 9, 3]])
    logits = any_policy(ids).logits
    state = torch.get_rng_state()
    plain_head(any_policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(any_policy) == 0
    assert any_policy.training
    assert all(torch.equal(part, weights[name]) for name, part in any_policy.state_dict().items())
    assert all(part.grad is None and part.requires_grad for part in any_policy.parameters())
    assert torch.equal(any_policy(ids).logits, logits)


def test_no_hooks_stay_where_the_model_fails(
    policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        plain_head(policy)
    assert hooks(policy) == 0


# --- three ways to the same numbers ---


Source = tuple[Tensor, nn.Linear | None]


def sources(policy: PreTrainedModel) -> tuple[Source, Source, Tensor]:
    """Hidden states with the head, and logits, of 13 counted tokens, and their labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :3] = False
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[2, 3:] = False
    head = plain_head(policy)
    assert head is not None
    hidden, _ = head_input(policy, head, ids, mask, counted)
    logits, _ = head_input(policy, None, ids, mask, counted)
    return (hidden, head), (logits, None), ids[:, -5:][counted]


def token_losses(rows: slice, outputs: PolicyOutputs) -> Tensor:
    """Losses ``[2, n]``, in which places, log-probabilities and every entropy count."""
    place = torch.arange(13, dtype=torch.float64)[rows]
    weight = (place + 1).cos()
    loss = weight * outputs.logprobs.exp()
    for i, region in enumerate(REGIONS):
        found = outputs.entropy(region)
        loss = loss + (place + i).sin() * found.scaled + 0.1 * found.region**2
    return torch.stack([loss, weight * outputs.logprobs])


def by_hand(logits: Tensor, labels: Tensor) -> PolicyOutputs:
    """The outputs from tre_lightning.entropy."""
    logprobs = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    entropies = {}
    for region in REGIONS:
        if region.whole:
            full = full_entropy(logits)
            stats = entropy_stats(logits, top_k=50)
            entropies[region] = stats._replace(region=full, scaled=full)
            continue
        kind = asdict(region)
        entropies[region] = entropy_stats(logits, **kind)._replace(
            region=trust_region_entropy(logits, **kind, rescale=False),
            scaled=trust_region_entropy(logits, **kind),
        )
    return PolicyOutputs(logprobs, entropies)


def policy_gradients(total: Tensor, policy: PreTrainedModel) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(policy.parameters()), retain_graph=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_three_ways_give_the_same_outputs_and_gradients(
    any_policy: PreTrainedModel, temperature: float
) -> None:
    policy = any_policy.double()
    hidden, logits, labels = sources(policy)
    ops = HeadOptions(REGIONS, temperature, MEMORY)
    slow = HeadOptions(REGIONS, temperature, MEMORY, fused=False)
    assert len(labels) == 13
    expected = by_hand(logits[0] / temperature, labels)
    total = token_losses(slice(None), expected).sum()
    gradients = policy_gradients(total, policy)
    assert all(gradient.any() for gradient in gradients if gradient.dim() > 1)

    for asked, source in ((ops, hidden), (ops, logits), (slow, logits)):
        outputs = head_outputs(*source, labels, asked)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.logprobs, expected.logprobs, **TIGHT)
        for region in REGIONS:
            mine, theirs = outputs.entropy(region), expected.entropy(region)
            torch.testing.assert_close(tuple(mine), tuple(theirs), **TIGHT)
        mine = policy_gradients(token_losses(slice(None), outputs).sum(), policy)
        torch.testing.assert_close(mine, gradients, **TIGHT)

        loss = head_loss(*source, labels, asked, token_losses)
        torch.testing.assert_close(loss.total, total, **TIGHT)
        torch.testing.assert_close(
            loss.losses, token_losses(slice(None), expected).detach(), **TIGHT
        )
        torch.testing.assert_close(loss.logprobs, expected.logprobs.detach(), **TIGHT)
        assert not loss.losses.requires_grad and not loss.logprobs.requires_grad
        torch.testing.assert_close(policy_gradients(loss.total, policy), gradients, **TIGHT)


def test_a_head_with_a_bias(policy: PreTrainedModel) -> None:
    policy.set_output_embeddings(nn.Linear(16, 50, bias=True))
    policy.double()
    hidden, logits, labels = sources(policy)
    asked = HeadOptions(REGIONS, 0.7, MEMORY)
    fused, plain = (head_outputs(*source, labels, asked) for source in (hidden, logits))
    torch.testing.assert_close(fused.logprobs, plain.logprobs, **TIGHT)
    mine, theirs = (
        torch.autograd.grad(token_losses(slice(None), out).sum(), policy.lm_head.bias)
        for out in (fused, plain)
    )
    assert mine[0].any()
    torch.testing.assert_close(mine, theirs, **TIGHT)
    loss = head_loss(*hidden, labels, asked, token_losses)
    (inside,) = torch.autograd.grad(loss.total, policy.lm_head.bias)
    torch.testing.assert_close(inside, theirs[0], **TIGHT)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("fused", [True, False])
def test_the_logits_are_shown_with_the_temperature_applied(
    policy: PreTrainedModel, temperature: float, fused: bool
) -> None:
    _, (logits, _), labels = sources(policy.double())
    asked = HeadOptions(REGIONS, temperature, MEMORY, fused=fused, show_logits=True)
    outputs = head_outputs(logits, None, labels, asked)
    assert outputs.logits is not None
    torch.testing.assert_close(outputs.logits, logits / temperature, **TIGHT)
    logprobs = outputs.logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(outputs.logprobs, logprobs, **TIGHT)
    # A loss may use them: their gradient counts beside that of the statistics.
    loss = head_loss(
        logits, None, labels, asked, lambda _, out: out.logits.square().sum(-1) + out.logprobs
    )
    expected = (logits / temperature).square().sum() + logprobs.sum()
    torch.testing.assert_close(loss.total, expected, **TIGHT)
    torch.testing.assert_close(
        policy_gradients(loss.total, policy), policy_gradients(expected, policy), **TIGHT
    )


@pytest.mark.parametrize(
    ("fused", "show_logits", "takes_hidden"),
    [(True, False, True), (True, True, False), (False, False, False), (False, True, False)],
)
def test_hidden_states_are_enough_for_the_ops_alone(
    fused: bool, show_logits: bool, takes_hidden: bool
) -> None:
    assert HeadOptions((), 1.0, MEMORY, fused, show_logits).takes_hidden == takes_hidden
