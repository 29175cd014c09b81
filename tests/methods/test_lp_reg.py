"""Tests of tre_lightning.methods.lp_reg."""

import math

import pytest
import torch

import batches
from tre_lightning.entropy import trust_region_mask
from tre_lightning.methods import LpReg, PolicyOutputs
from tre_lightning.methods.hooks import Tokens

INF = math.inf
P = [0.5, 0.3, 0.1, 0.06, 0.04]


def outputs(term: LpReg, p: list[float], ids: list[int]) -> PolicyOutputs:
    """What the policy says of these tokens, each at a position where it gives ``p``."""
    made = batches.outputs(term, torch.tensor([p] * len(ids)).log())
    logprobs = torch.tensor([p[i] for i in ids]).log()
    return PolicyOutputs(logprobs.requires_grad_(), made.entropies)


def kept(*proxy: float) -> Tokens:
    """Tokens of which ``observe`` kept these probabilities by the proxy."""
    values = {"lp_reg": torch.tensor(proxy).log()}
    return batches.tokens(len(proxy), observed=values)


def test_the_proxy_is_the_min_p_region_renormalised() -> None:
    term = LpReg(min_p=0.15)  # 0.5, 0.3 and 0.1 are kept, 0.9 in all
    found = term.observe(outputs(term, P, [0, 1, 2, 3, 4]), None)
    expected = [math.log(x / 0.9) for x in (0.5, 0.3, 0.1)]
    assert found.tolist() == pytest.approx([*expected, -INF, -INF], abs=1e-6)


def test_the_proxy_holds_the_tokens_of_the_region() -> None:
    torch.manual_seed(0)
    logits = 3.0 * torch.randn(50, 30)
    term = LpReg(min_p=0.1)
    mask = trust_region_mask(logits, min_p=0.1)
    proxy = logits.masked_fill(~mask, -INF).log_softmax(-1)
    entropies = batches.outputs(term, logits).entropies
    for token in range(30):
        logprobs = logits.log_softmax(-1)[:, token]
        found = term.observe(PolicyOutputs(logprobs, entropies), None)
        torch.testing.assert_close(found, proxy[:, token], atol=1e-5, rtol=1e-5)


def test_penalty_and_gradient_by_hand() -> None:
    term = LpReg()
    out = PolicyOutputs(torch.tensor([0.1, 0.1, 0.1, 1e-4]).log().requires_grad_(), {})
    # More probable by the proxy, less, filtered out, and 3,000 times as probable.
    loss = term.per_token(out, kept(0.15, 0.05, 0.0, 0.3))
    assert loss.tolist() == pytest.approx([0.5 - math.log(1.5), 0.0, 0.0, 10.0], abs=1e-6)
    loss.sum().backward()
    # d/dlog p of r - log r - 1 is 1 - r; none where it is held.
    assert out.logprobs.grad.tolist() == pytest.approx([1.0 - 1.5, 0.0, 0.0, 0.0], abs=1e-6)


def test_a_token_far_from_the_proxy_has_a_finite_gradient() -> None:
    out = PolicyOutputs(torch.tensor([-500.0], requires_grad=True), {})
    LpReg().per_token(out, kept(0.5)).sum().backward()
    assert out.logprobs.grad.tolist() == [0.0]


def test_the_least_likely_punished_tokens_are_chosen() -> None:
    minibatch = batches.training_batch(
        [[-1.0, -1.0, 1.0], [-0.5, 0.0], [-2.0]],
        old_logprobs=[[-1.0, -5.0, -9.0], [-4.0, -9.0], [-3.0]],
    )
    # Four are punished: half of them are those at -5 and -4; the -9 are not punished.
    chosen = LpReg(fraction=0.5).token_weights(minibatch)
    assert chosen.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    one = LpReg(fraction=0.01).token_weights(minibatch)  # one at least
    assert one.nonzero().tolist() == [[0, 1]]
    none = batches.training_batch([[1.0, 0.0]], old_logprobs=[[-1.0, -2.0]])
    assert not LpReg().token_weights(none).any()
    unscored = batches.without(minibatch, 0)
    assert LpReg(fraction=0.5).token_weights(unscored).nonzero().tolist() == [[1, 0]]
