"""Tests of tre_lightning.methods.covariance."""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import batches
import runs
from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import ClipCov, KLCov, LinearSchedule, PolicyOutputs
from tre_lightning.methods.covariance import covariances
from tre_lightning.methods.hooks import POLICY, weighed

KEY = ("minibatches", 0, "clip_cov")

# Means -2 and 1.
LOGPROBS = [[-1.0, -3.0, -1.0], [-2.0, -4.0], [-1.0]]
ADVANTAGES = [[2.0, 1.0, 0.0], [5.0, -2.0], [0.0]]
COVARIANCES = [[1.0, 0.0, -1.0], [0.0, 6.0], [-1.0]]


def batch() -> TrainingBatch:
    return batches.training_batch(ADVANTAGES, LOGPROBS)


def random_batch(seed: int = 0, lengths: Sequence[int] = (7, 3, 9, 1)) -> TrainingBatch:
    draws = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(2, length, generator=draws).tolist() for length in lengths]
    return batches.training_batch([row[0] for row in numbers], [row[1] for row in numbers])


def held(method: KLCov, minibatch: TrainingBatch) -> Tensor:
    made = method.token_weights(minibatch)
    assert made is not None and made.shape == minibatch.response_mask.shape
    return made


def kept(method: ClipCov, minibatch: TrainingBatch, key: tuple[int | str, ...] = KEY) -> Tensor:
    made = method.policy_weights(minibatch, key)
    assert made is not None and made.shape == minibatch.response_mask.shape
    assert not made.isnan().any()
    return made


# --- covariances ---


def test_covariances_by_hand() -> None:
    made = covariances(batch())
    assert torch.equal(made, batches.padded(COVARIANCES))  # 0, not NaN, at the padding


def test_unscored_responses_are_in_no_mean() -> None:
    made = covariances(
        batches.without(batch(), 0, 2)
    )  # left: -2 and -4, 5 and -2; means -3 and 1.5
    assert made.tolist() == [[0.0] * 3, [1.0 * 3.5, -1.0 * -3.5, 0.0], [0.0] * 3]


def test_constant_advantages_covary_with_nothing() -> None:
    # The float32 mean of ten times 1.1 is not 1.1.
    made = covariances(batches.training_batch([[1.1] * 10], [[-0.1 * i for i in range(10)]]))
    assert torch.equal(made, torch.zeros(1, 10))


# --- KL-Cov ---


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0002, [[0, 0, 0], [0, 1, 0], [0, 0, 0]]),  # at least 1
        (0.34, [[1, 0, 0], [0, 1, 0], [0, 0, 0]]),  # 2.04 is rounded down
        (0.5, [[1, 1, 0], [0, 1, 0], [0, 0, 0]]),  # of the two at 0 the first
        (1.0, [[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
    ],
)
def test_kl_cov_holds_the_largest_covariances(fraction: float, expected: list[list[int]]) -> None:
    assert held(KLCov(fraction=fraction), batch()).int().tolist() == expected


def test_kl_cov_leaves_unscored_responses_alone() -> None:
    assert held(KLCov(), batches.without(batch(), 1)).sum() == 1.0
    assert held(KLCov(), batches.without(batch(), 1))[1].sum() == 0.0


def test_kl_cov_is_the_absolute_difference() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    tokens = batches.tokens(3, old_logprobs=[-1.5, -2.0, -2.0])
    made = KLCov().per_token(PolicyOutputs(logprobs, {}), tokens)
    assert made.tolist() == [0.5, 0.0, 1.0]
    made.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [1.0, 0.0, -1.0]  # 0 where the policy has not moved


# --- Clip-Cov ---


def test_clip_cov_leaves_out_tokens_of_the_band() -> None:
    # Covariances of 1 and 6 are in the open band; half of the 6 tokens are more than these two.
    made = kept(ClipCov(fraction=0.5, low=0.5, high=7.0), batch())
    assert made[batch().response_mask].tolist() == [0, 1, 1, 1, 0, 1]
    for low, high in ((1.0, 7.0), (0.5, 6.0)):  # the bounds are outside
        made = kept(ClipCov(fraction=0.5, low=low, high=high), batch())
        assert (made == 0).sum() == 1
    assert (kept(ClipCov(low=7.0, high=8.0), batch()) == 1).all()


@given(fraction=st.floats(0.001, 1.0), seed=st.integers(0, 50))
def test_clip_cov_draws_the_share_from_the_band(fraction: float, seed: int) -> None:
    minibatch, method = random_batch(seed), ClipCov(fraction, low=-0.5, high=0.5)
    out = kept(method, minibatch) == 0
    parts = covariances(minibatch)
    band = minibatch.response_mask & (parts > -0.5) & (parts < 0.5)
    assert not (out & ~band).any()
    wanted = max(1, math.floor(fraction * 20 + 1e-9))
    assert out.sum() == min(wanted, int(band.sum()))


def test_clip_cov_draws_by_its_key() -> None:
    minibatch, method = random_batch(), ClipCov(fraction=0.1, low=-100.0, high=100.0)
    draws = [kept(method, minibatch, ("minibatches", i)) for i in range(200)]
    assert torch.equal(draws[3], kept(method, minibatch, ("minibatches", 3)))
    assert all((made == 0).sum() == 2 for made in draws)
    times = torch.stack([made == 0 for made in draws]).sum(0)[minibatch.response_mask]
    # 2 of 20 tokens, 200 times: 20 each, standard deviation 4.2.
    assert times.min() >= 3 and times.max() <= 40


def test_clip_cov_leaves_unscored_responses_alone() -> None:
    made = kept(ClipCov(fraction=1.0, low=-100.0, high=100.0), batches.without(batch(), 1))
    assert made.int().tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 1]]


def test_share_0_switches_clip_cov_off() -> None:
    assert ClipCov(fraction=0.0).policy_weights(batch(), KEY) is None


# --- both ---


def test_a_minibatch_without_tokens() -> None:
    empty = batches.without(batch())
    made = weighed(empty, [KLCov(), ClipCov()], ("minibatches", 0)).weights
    assert (made["kl_cov"] == 0).all() and (made[POLICY] == 1).all()


def test_defaults_are_the_authors() -> None:
    assert (KLCov().coef, KLCov().fraction) == (1.0, 0.0002)
    assert (ClipCov().fraction, ClipCov().low, ClipCov().high) == (0.0002, 1.0, 5.0)


def test_they_pickle() -> None:
    minibatch = random_batch()
    penalty = KLCov(LinearSchedule(1.0, 0.0, 4), fraction=0.3)
    copied = pickle.loads(pickle.dumps(penalty))
    assert torch.equal(held(copied, minibatch), held(penalty, minibatch))
    assert copied.coef_at(1) == 0.75 and copied.state_key == penalty.state_key
    clip = ClipCov(0.3, -1.0, 1.0)
    copied = pickle.loads(pickle.dumps(clip))
    assert torch.equal(kept(copied, minibatch), kept(clip, minibatch))
    assert copied.state_key == clip.state_key


# --- whole runs ---


def trained(run_dir: Path, *callbacks: dict[str, Any], flags: Sequence[str] = ()) -> dict[str, Any]:
    short = ("--trainer.max_epochs=1", "--data.init_args.iterations_per_epoch=1")
    flags = (*short, "--trainer.precision=64-true", *flags)
    runs.run(run_dir, *flags, changes={"trainer.callbacks": list(callbacks)})
    return runs.weights(run_dir)


def test_kl_cov_does_nothing_in_the_first_update(tmp_path: Path) -> None:
    once = ("--model.ppo.num_epochs=1", "--model.ppo.num_minibatches=1")
    unclipped = [f"--model.ppo.{name}=null" for name in ("clip_eps_low", "clip_eps_high")]
    # All rows in one micro-batch: other padding could leave rounding, whose sign would count.
    flags = (*once, *unclipped, "--model.ppo.micro_batch_size=16")
    flags += ("--model.ppo.old_logprobs=recompute",)
    kl_cov = {"class_path": "tre_lightning.methods.KLCov", "init_args": {"fraction": 0.3}}
    plain = trained(tmp_path / "plain", flags=flags)
    made = trained(tmp_path / "kl_cov", kl_cov, flags=flags)
    assert runs.distance(made, plain) == 0.0
    assert runs.scalars(tmp_path / "kl_cov")["loss/kl_cov"] == [(0, 0.0)]


class Recorded(KLCov):
    """KL-Cov that keeps what it holds of each minibatch."""

    seen: ClassVar[list[Tensor]] = []

    def token_weights(self, minibatch: TrainingBatch) -> Tensor | None:
        made = super().token_weights(minibatch)
        assert made is not None
        self.seen.append(made)
        return made


def test_micro_batches_do_not_change_what_kl_cov_holds(tmp_path: Path) -> None:
    # Not the trained weights: rounding at the first update is a difference whose sign counts.
    spec = {"class_path": "test_covariance.Recorded", "init_args": {"fraction": 0.3}}
    held_by = []
    for size in (16, 3):
        Recorded.seen.clear()
        trained(tmp_path / f"{size}", spec, flags=[f"--model.ppo.micro_batch_size={size}"])
        held_by.append([*Recorded.seen])
    assert len(held_by[0]) == runs.STEPS_AN_ITERATION
    for first, second in zip(*held_by, strict=True):
        assert torch.equal(first, second) and first.sum() > 1
