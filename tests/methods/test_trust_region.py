"""Tests of what tre_lightning.methods.TrustRegionEntropy offers beyond the paper."""

import math
from typing import Any

import pytest
import torch

import batches
from batches import entropy, outputs
from tre_lightning.entropy import entropy_of_tokens, trust_region_entropy, trust_region_mask
from tre_lightning.methods import LinearSchedule, TrustRegionEntropy

P = [0.5, 0.3, 0.1, 0.06, 0.04]
SURE = [0.96, 0.02, 0.01, 0.006, 0.004]


# --- regions that are given ---


def test_entropy_of_given_tokens_by_hand() -> None:
    logits = torch.tensor([P, P, P]).log()
    ids = torch.tensor([[0, 2, -1], [4, 1, 3], [2, -1, -1]])
    found, scale = entropy_of_tokens(logits, ids)
    expected = [entropy(0.5, 0.1), entropy(0.04, 0.3, 0.06), 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    scales = [math.log(5) / math.log(2), math.log(5) / math.log(3), 0.0]
    assert scale.tolist() == pytest.approx(scales)


def test_gradient_of_given_tokens() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 5, -1], [1, 2, 3], [4, -1, -1], [3, 0, -1]])
    assert torch.autograd.gradcheck(lambda z: entropy_of_tokens(z, ids)[0], logits)


@pytest.mark.parametrize("region", [{"top_k": 2}, {"top_p": 0.85}, {"min_p": 0.2}])
@pytest.mark.parametrize("owner", ["behaviour", "reference"])
def test_the_region_is_its_owners(owner: str, region: dict[str, Any]) -> None:
    torch.manual_seed(0)
    now, then = torch.randn(2, 7, 12).unbind()
    term = TrustRegionEntropy(region_of=owner, **region)  # type: ignore[arg-type]
    seen, other = outputs(term, then), outputs(term, torch.zeros(7, 12))
    pair = (seen, None) if owner == "behaviour" else (other, seen)
    kept = term.observe(*pair)
    assert kept is not None
    mask = trust_region_mask(then, **region)
    expected = [sorted(row.nonzero().flatten().tolist()) for row in mask]
    assert [sorted(i for i in row if i >= 0) for row in kept.tolist()] == expected
    loss = term.per_token(outputs(term, now), batches.tokens(7, observed={"tre": kept}))
    inside = now.masked_fill(~mask, -math.inf).log_softmax(-1)
    plain = -(inside.exp() * inside.masked_fill(~mask, 0.0)).sum(-1)
    size = mask.sum(-1)
    scale = torch.where(size > 1, math.log(12) / size.clamp(min=2).log(), 0.0)
    torch.testing.assert_close(loss, -plain * scale)


def test_on_policy_the_behaviours_region_is_the_current_one() -> None:
    logits = torch.tensor([P, SURE]).log()
    term = TrustRegionEntropy(top_p=0.85, region_of="behaviour")
    kept = term.observe(outputs(term, logits), None)
    assert kept is not None
    loss = term.per_token(outputs(term, logits), batches.tokens(2, observed={"tre": kept}))
    torch.testing.assert_close(loss, -trust_region_entropy(logits, top_p=0.85))


def test_a_wide_nucleus_keeps_its_most_probable_tokens() -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    term = TrustRegionEntropy(top_p=0.95, region_of="behaviour", max_size=3)
    kept = term.observe(outputs(term, logits), None)
    assert kept is not None and kept.tolist() == [[3, 1, 2]]


def test_the_current_policys_region_is_not_kept() -> None:
    term = TrustRegionEntropy(top_k=2)
    assert term.observe(outputs(term, torch.tensor([P]).log()), None) is None
    assert not term.needs_logits and not term.needs_reference


# --- schedules and least size ---


def test_the_region_follows_its_schedule() -> None:
    term = TrustRegionEntropy(top_k=LinearSchedule(2, 6, 4))
    sizes = []
    for iteration in (0, 1, 2, 4, 9):
        term.iteration = iteration
        sizes.append(term.region.top_k)
        assert term.regions == (term.region,)
    assert sizes == [2, 3, 4, 6, 6]
    nucleus = TrustRegionEntropy(top_p=LinearSchedule(0.9, 0.5, 2))
    nucleus.iteration = 1
    assert nucleus.region.top_p == pytest.approx(0.7)
    relative = TrustRegionEntropy(min_p=LinearSchedule(0.1, 0.02, 4))
    relative.iteration = 2
    assert relative.region.min_p == pytest.approx(0.06)


def test_min_p_by_hand() -> None:
    term = TrustRegionEntropy(min_p=0.15)  # 0.075 of the first row, 0.144 of the second
    out = outputs(term, torch.tensor([P, SURE]).log())
    scale = math.log(5) / math.log(3)
    expected = [-entropy(0.5, 0.3, 0.1) * scale, 0.0]
    assert term.per_token(out, batches.tokens(2)).tolist() == pytest.approx(expected, rel=1e-5)
    assert term.scale(out).tolist() == pytest.approx([scale, 0.0])


def test_a_nucleus_does_not_shrink_below_its_least_size() -> None:
    term = TrustRegionEntropy(top_p=0.75, min_size=3, rescale=False)
    out = outputs(term, torch.tensor([P, SURE]).log())
    loss = term.per_token(out, batches.tokens(2))
    # .5 + .3 reach .75 with two tokens, .96 with one: both become the top three.
    expected = [-entropy(0.5, 0.3, 0.1), -entropy(0.96, 0.02, 0.01)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    relative = TrustRegionEntropy(min_p=0.5, min_size=3, rescale=False)
    loss = relative.per_token(outputs(relative, torch.tensor([P, SURE]).log()), batches.tokens(2))
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    wide = TrustRegionEntropy(top_p=0.95, min_size=3)  # .5 + .3 + .1 + .06: four tokens
    out = outputs(wide, torch.tensor([P]).log())
    assert wide.scale(out).item() == pytest.approx(math.log(5) / math.log(4))
    assert wide.per_token(out, batches.tokens(1)).item() == pytest.approx(
        -entropy(0.5, 0.3, 0.1, 0.06) * math.log(5) / math.log(4), rel=1e-5
    )
