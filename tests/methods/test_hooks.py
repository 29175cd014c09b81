"""Tests of tre_lightning.methods: hooks, TRE and the entropy bonus."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import batches
from batches import entropy
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import (
    EntropyBonus,
    LinearSchedule,
    LossTerm,
    Method,
    PolicyOutputs,
    Tokens,
    TrustRegionEntropy,
    find_methods,
)
from tre_lightning.methods.hooks import POLICY, adapt, shaped, start_iteration, weighed
from tre_lightning.ops import Region

P = [0.5, 0.3, 0.1, 0.1]
NONE = batches.tokens(0)  # these terms look at the outputs alone

REGIONS = (
    Region(),
    Region(top_k=2),
    Region(top_k=3),
    Region(top_p=0.75),
    Region(top_p=0.85),
    Region(top_p=0.9),
)


def outputs(*rows: list[float], fused: bool = True) -> PolicyOutputs:
    """Tokens that have these probabilities."""
    return of_logits(torch.tensor(rows).log(), fused)


def of_logits(logits: Tensor, fused: bool = True) -> PolicyOutputs:
    return batches.outputs(Method("any"), logits, *REGIONS, fused=fused)


# --- terms ---


@pytest.mark.parametrize(
    ("region", "kept"),
    [
        ({"top_k": 2}, [0.5, 0.3]),
        ({"top_k": 3}, [0.5, 0.3, 0.1]),
        ({"top_p": 0.75}, [0.5, 0.3]),
        ({"top_p": 0.85}, [0.5, 0.3, 0.1]),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_trust_region_entropy_by_hand(
    region: dict[str, float], kept: list[float], fused: bool
) -> None:
    scale = math.log(4) / math.log(len(kept))
    rescaled = TrustRegionEntropy(**region)
    plain = TrustRegionEntropy(**region, rescale=False)
    out = outputs(P, [0.97, 0.01, 0.01, 0.01], fused=fused)
    loss = rescaled.per_token(out, NONE)
    assert loss.shape == (2,)
    assert loss[0].item() == pytest.approx(-scale * entropy(*kept), rel=1e-5)
    assert plain.per_token(out, NONE)[0].item() == pytest.approx(-entropy(*kept), rel=1e-5)
    assert rescaled.scale(out)[0].item() == pytest.approx(scale, rel=1e-6)
    assert torch.equal(plain.scale(out), torch.ones(2))


def test_effective_scale_of_top_k_is_log_v_over_log_k() -> None:
    out = outputs(P, [0.97, 0.01, 0.01, 0.01])
    scale = TrustRegionEntropy(top_k=2).scale(out)
    torch.testing.assert_close(scale, torch.full((2,), math.log(4) / math.log(2)))


def test_a_region_of_one_token_has_scale_and_loss_zero() -> None:
    out = outputs([0.97, 0.01, 0.01, 0.01])
    term = TrustRegionEntropy(top_p=0.9)
    assert term.scale(out).item() == 0.0
    assert term.per_token(out, NONE).item() == 0.0


def test_entropy_bonus_by_hand() -> None:
    term = EntropyBonus()
    out = outputs(P, [0.25] * 4)
    expected = torch.tensor([-entropy(*P), -math.log(4)])
    torch.testing.assert_close(term.per_token(out, NONE), expected)
    assert torch.equal(term.scale(out), torch.ones(2))


def test_lowering_the_loss_raises_the_entropy() -> None:
    for term in (EntropyBonus(), TrustRegionEntropy(top_k=2)):
        logits = torch.tensor([P]).log().requires_grad_()
        before = term.per_token(of_logits(logits), NONE)
        before.sum().backward()
        step = of_logits((logits - 0.1 * logits.grad).detach())
        assert term.per_token(step, NONE).item() < before.item()


def test_defaults_are_the_papers() -> None:
    assert TrustRegionEntropy(top_k=2).coef == 0.001
    assert TrustRegionEntropy(top_k=2).rescale


@pytest.mark.parametrize("region", [{}, {"top_k": 2, "top_p": 0.9}, {"top_k": 0}, {"top_p": 1.0}])
def test_trust_region_entropy_refuses_a_bad_region(region: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"top_[kp]"):
        TrustRegionEntropy(**region)


def test_a_region_that_no_term_names_is_refused() -> None:
    assert EntropyBonus().regions == (Region(),)
    assert TrustRegionEntropy(top_k=4).regions == (Region(top_k=4),)
    with pytest.raises(ValueError, match=r"top_k=4.* name it in the method's `regions`"):
        TrustRegionEntropy(top_k=4).per_token(outputs(P), NONE)


# --- coefficients ---


@pytest.mark.parametrize(
    ("iteration", "value"), [(0, 0.4), (1, 0.3), (2, 0.2), (4, 0.0), (5, 0.0), (1000, 0.0)]
)
def test_linear_schedule_by_hand(iteration: int, value: float) -> None:
    schedule = LinearSchedule(start=0.4, end=0.0, iterations=4)
    assert schedule.at(iteration) == pytest.approx(value)
    assert EntropyBonus(schedule).coef_at(iteration) == pytest.approx(value)


def test_a_schedule_may_rise_and_a_number_stays() -> None:
    assert LinearSchedule(0.0, 1.0, 10).at(3) == pytest.approx(0.3)
    assert [EntropyBonus(0.5).coef_at(i) for i in (0, 7, 10**6)] == [0.5] * 3


def test_a_schedule_needs_an_iteration() -> None:
    with pytest.raises(ValueError, match=r"iterations=0 "):
        LinearSchedule(1.0, 0.0, 0)


@pytest.mark.parametrize(
    "coef", [-0.1, math.nan, LinearSchedule(-0.1, 1.0, 2), LinearSchedule(1.0, -0.1, 2)]
)
def test_a_negative_coefficient_is_refused(coef: float | LinearSchedule) -> None:
    with pytest.raises(ValueError, match=r"\[mine\]\.coef="):
        EntropyBonus(coef, name="mine")
    with pytest.raises(ValueError, match=r"\[mine\]\.coef="):
        TrustRegionEntropy(coef, top_k=2, name="mine")


def test_coefficient_zero_switches_off() -> None:
    assert EntropyBonus(0.0).coef_at(0) == 0.0


# --- as callbacks ---


class Constant(LossTerm):
    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        return torch.full_like(outputs.logprobs, 3.0)


class Controlled(Constant):
    """Its coefficient is the number of rollouts that it has seen, plus a tenth of the iteration."""

    seen = reads = 0

    def adapt(self, batch: TrainingBatch) -> None:
        self.seen += 1

    def coef_at(self, iteration: int) -> float:
        self.reads += 1
        return self.seen + 0.1 * iteration


def test_a_coefficient_is_read_once_an_iteration_after_all_have_adapted() -> None:
    schedule = LinearSchedule(start=0.4, end=0.0, iterations=4)
    methods = [EntropyBonus(schedule), Controlled("controlled", 1.0), Method("another")]
    batch = batches.training_batch([[1.0]])
    for iteration, expected in ((0, [0.4, 1.0]), (1, [0.3, 2.1]), (5, [0.0, 3.5])):
        start_iteration(methods, iteration)
        assert [method.iteration for method in methods] == [iteration] * 3
        adapt(methods, batch)
        assert [term.current_coef for term in methods[:2]] == pytest.approx(expected)
    assert methods[1].reads == 3


def test_find_methods_keeps_the_order_and_skips_other_callbacks() -> None:
    a, b = EntropyBonus(), Constant("mine", 1.0)
    assert find_methods([Callback(), b, Callback(), a]) == [b, a]
    assert find_methods([]) == []


def test_two_terms_of_one_name_are_refused() -> None:
    terms = [TrustRegionEntropy(top_k=2, name="same"), EntropyBonus(name="same")]
    with pytest.raises(ValueError, match=r"2 methods are named 'same'"):
        find_methods(terms)
    with pytest.raises(ValueError, match="same"):
        terms[0].setup(SimpleNamespace(callbacks=terms), SimpleNamespace(), "fit")


def test_terms_of_different_names_may_run_together() -> None:
    terms = [TrustRegionEntropy(top_k=k, name=f"top{k}") for k in (2, 3)]
    terms[0].setup(SimpleNamespace(callbacks=terms), SimpleNamespace(), "fit")
    assert find_methods(terms) == terms
    # Lightning keeps the state of callbacks by this key and refuses two that are equal.
    assert terms[0].state_key != terms[1].state_key
    assert EntropyBonus(name="x").state_key != Constant("x", 1.0).state_key


def test_a_term_of_its_own_has_scale_one() -> None:
    out = outputs(P, P)
    assert torch.equal(Constant("mine", 1.0).scale(out), torch.ones(2))


@pytest.mark.parametrize(
    "term",
    [
        TrustRegionEntropy(0.25, top_k=3, name="a"),
        TrustRegionEntropy(LinearSchedule(1.0, 0.0, 4), top_p=0.75, rescale=False),
        EntropyBonus(0.5),
    ],
)
def test_terms_pickle(term: LossTerm) -> None:
    copied = pickle.loads(pickle.dumps(term))
    out = outputs(P)
    assert torch.equal(copied.per_token(out, NONE), term.per_token(out, NONE))
    assert torch.equal(copied.scale(out), term.scale(out))
    assert copied.state_key == term.state_key
    assert [copied.coef_at(i) for i in range(5)] == [term.coef_at(i) for i in range(5)]


# --- hooks ---


class Doubles(Method):
    def shape_advantages(self, batch: TrainingBatch) -> Tensor:
        return 2.0 * batch.advantages

    def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> Tensor:
        return torch.full_like(minibatch.advantages, 0.5)


class AddsOne(Method):
    def shape_advantages(self, batch: TrainingBatch) -> Tensor:
        return batch.advantages + 1.0


class Weighted(Constant):
    def token_weights(self, minibatch: TrainingBatch) -> Tensor:
        return minibatch.advantages


def test_a_method_changes_nothing_by_itself() -> None:
    batch = batches.training_batch([[1.0, 2.0], [3.0]])
    method = Method("idle")
    assert method.observe(outputs(P), None) is None
    assert method.shape_advantages(batch) is batch.advantages
    assert weighed(batch, [method, Constant("mine", 1.0)], (1,)).weights == {}
    assert method.logged() == {}


def test_advantages_are_shaped_in_the_order_of_the_callbacks() -> None:
    batch = batches.training_batch([[1.0, 2.0], [3.0]])
    mask = batch.response_mask
    made = shaped(batch, [Doubles("a"), AddsOne("b")])
    assert made.advantages[mask].tolist() == [3.0, 5.0, 7.0]
    made = shaped(batch, [AddsOne("b"), Doubles("a")])
    assert made.advantages[mask].tolist() == [4.0, 6.0, 8.0]
    assert batch.advantages[mask].tolist() == [1.0, 2.0, 3.0]


def test_weights_of_the_policy_multiply_and_each_term_has_its_own() -> None:
    batch = batches.training_batch([[1.0, 2.0], [3.0]])
    made = weighed(batch, [Doubles("a"), Weighted("t", 1.0), Doubles("b")], (1,))
    assert made.weights[POLICY].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert made.weights["t"][batch.response_mask].tolist() == [1.0, 2.0, 3.0]


def test_every_method_draws_from_its_own_key() -> None:
    seen = []

    class Draws(Method):
        def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> None:
            seen.append(key)

    weighed(batches.training_batch([[1.0]]), [Draws("a"), Draws("b")], ("minibatches", 3))
    assert seen == [("minibatches", 3, "a"), ("minibatches", 3, "b")]


def test_tokens_are_the_counted_ones_in_reading_order() -> None:
    batch = batches.training_batch(
        [[1.0, 2.0], [3.0]], [[-1.0, -2.0], [-3.0]], {"seen": [[5.0, 6.0], [7.0]]}
    )
    tokens = Tokens.of(batch)
    assert tokens.advantages.tolist() == [1.0, 2.0, 3.0]
    assert tokens.old_logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert tokens.positions.tolist() == [0, 1, 0]
    assert tokens.observed["seen"].tolist() == [5.0, 6.0, 7.0]
    assert tokens[1:].observed["seen"].tolist() == [6.0, 7.0]
    assert tokens[1:].positions.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["policy", "kl", "value", "total"])
def test_a_name_that_the_logs_need_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"named '{name}'"):
        find_methods([Method(name)])
