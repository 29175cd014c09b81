"""rollout -> scores -> advantages -> minibatches.

After scoring, the rows of all ranks are gathered: every rank computes the same advantages over the
global batch (so whitening is global), draws the same minibatches, and trains on its share of each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from tre_lightning.advantages import Estimator, estimate, whitened, whitens
from tre_lightning.distributed import gather_rows
from tre_lightning.kl import KLEstimator, kl_estimate
from tre_lightning.rollout import Rollout
from tre_lightning.seeding import permutation


@dataclass(frozen=True)
class Experience(Rollout):
    """A scored rollout under the policy that sampled it.

    ``response_mask`` excludes every token of a response that could not be scored.
    """

    scores: Tensor  # [B] float32, one a sequence; NaN = could not be scored
    old_logprobs: Tensor  # [B, T] float32
    ref_logprobs: Tensor | None  # [B, T] float32, of the reference policy where there is one
    values: Tensor | None  # [B, T] float32, where there is a critic
    observed: Mapping[str, Tensor]  # [B, T, ...] each, what the methods kept of every token

    def gathered(self) -> "Experience":
        """The same with the rows of all ranks, in rank order."""

        def gather(name: str, rows: Tensor) -> Tensor:
            if name.startswith("prompt_"):  # padded on the left
                return gather_rows(rows.flip(1), 0).flip(1)
            return gather_rows(rows, 0)

        return self.map(gather)


@dataclass(frozen=True)
class TrainingBatch(Experience):
    """Experience with the targets of the update."""

    rewards: Tensor  # [B, T] float32, one a token
    advantages: Tensor  # [B, T] float32
    returns: Tensor | None  # [B, T] float32, the critic's targets where there is one
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # [B, T] each, in a loss's mean

    def micro_batches(self, size: int) -> Iterator["TrainingBatch"]:
        """Consecutive slices of at most ``size`` rows, without columns that all of them pad."""
        for start in range(0, len(self), size):
            yield self[start : start + size].trimmed()

    def uncounted(self) -> "TrainingBatch":
        """The same rows, of which no token counts."""
        return replace(self, response_mask=torch.zeros_like(self.response_mask))

    def trimmed(self) -> "TrainingBatch":
        """Without the columns that are padding in every row."""
        longest_prompt = int(self.prompt_mask.any(0).sum())
        # A fully masked response still needs a column for the model to run on.
        longest = max(1, int(self.response_mask.any(0).long().cumsum(0).argmax()) + 1)

        def cut(name: str, rows: Tensor) -> Tensor:
            if rows.dim() == 1:
                return rows
            return rows[:, -longest_prompt:] if name.startswith("prompt_") else rows[:, :longest]

        return self.map(cut)


def build_experience(
    rollout: Rollout,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    observed: Mapping[str, Tensor] | None = None,
) -> Experience:
    """Join a rollout with its scores ``[B]`` and what the models say of it, each ``[B, T]``."""
    scored = ~scores.isnan()
    mask = rollout.response_mask & scored.unsqueeze(1)
    return Experience(
        prompt_ids=rollout.prompt_ids,
        prompt_mask=rollout.prompt_mask,
        response_ids=rollout.response_ids,
        response_mask=mask,
        finished=rollout.finished,
        scores=scores,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        observed=observed or {},
        behaviour_logprobs=rollout.behaviour_logprobs,
    )


def compute_targets(
    experience: Experience,
    *,
    estimator: Estimator,
    num_responses: int,
    gamma: float,
    gae_lambda: float,
    kl_coef: float,
    kl_estimator: KLEstimator,
    whiten: bool | None,
) -> TrainingBatch:
    """Token rewards, advantages and, with a critic, returns.

    ``kl_coef`` is that of a penalty in the reward. ``whiten`` normalises the advantages over the
    whole batch; None = as the estimator's paper does.
    """
    rewards = token_rewards(experience, kl_coef, kl_estimator)
    advantages, returns = estimate(
        estimator,
        rewards,
        experience.values,
        experience.response_mask,
        num_responses=num_responses,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    if whitens(estimator) if whiten is None else whiten:
        advantages = whitened(advantages, experience.response_mask)
    known = {f.name: getattr(experience, f.name) for f in fields(experience)}
    return TrainingBatch(**known, rewards=rewards, advantages=advantages, returns=returns)


def token_rewards(experience: Experience, kl_coef: float, kl_estimator: KLEstimator) -> Tensor:
    """Score at the last counted token, minus ``kl_coef`` times the KL to the reference, ``[B, T]``.

    The KL of every counted token by ``kl_estimator``; :mod:`tre_lightning.kl` says what for.
    """
    mask = experience.response_mask
    rewards = torch.zeros_like(experience.old_logprobs)
    if kl_coef != 0.0 and experience.ref_logprobs is not None:
        penalty = kl_estimate(kl_estimator, experience.old_logprobs, experience.ref_logprobs)
        rewards = torch.where(mask, -kl_coef * penalty, rewards)
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    scores = experience.scores.nan_to_num(0.0).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.to(rewards) * mask.any(1, keepdim=True))


def minibatches(batch: TrainingBatch, number: int, *key: int | str) -> Iterator[TrainingBatch]:
    """``number`` random minibatches of nearly equal size, shuffled by ``key``."""
    order = permutation(len(batch), *key).to(batch.response_ids.device)
    for rows in order.tensor_split(number):
        yield batch[rows]
