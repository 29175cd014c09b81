"""Training targets: rollout -> scores -> advantages -> minibatches.

After scoring, the rows of all ranks are gathered: every rank computes the same advantages over the
global batch (so whitening is global), draws the same minibatches, and trains on its rows of each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch
from torch import Tensor

from tre_lightning.batches import Experience, Rollout, TrainingBatch
from tre_lightning.common.seeding import permutation
from tre_lightning.training.advantages import Estimator, estimate, whitened, whitens
from tre_lightning.training.kl import KLEstimator, kl_estimate


def build_experience(
    rollout: Rollout,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    observed: Mapping[str, Tensor] | None = None,
) -> Experience:
    """Join a rollout with its scores ``[B]`` and the models' outputs, each ``[B, T]``."""
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

    The KL of every counted token by ``kl_estimator``; :mod:`tre_lightning.training.kl` says what
    for.
    """
    mask = experience.response_mask
    rewards = torch.zeros_like(experience.old_logprobs)
    if kl_coef != 0.0 and experience.ref_logprobs is not None:
        penalty = kl_estimate(kl_estimator, experience.old_logprobs, experience.ref_logprobs)
        rewards = torch.where(mask, -kl_coef * penalty, rewards)
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    scores = experience.scores.nan_to_num(0.0).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.to(rewards) * mask.any(1, keepdim=True))


def minibatches(
    batch: TrainingBatch, number: int, *key: int | str, together: int = 1
) -> Iterator[TrainingBatch]:
    """``number`` random minibatches of nearly equal size, shuffled by ``key``.

    So many rows that follow each other stay ``together``: the responses to a prompt.
    """
    order = permutation(len(batch) // together, *key).to(batch.response_ids.device)
    one = torch.arange(together, device=order.device)
    for groups in order.tensor_split(number):
        yield batch[(groups.unsqueeze(1) * together + one).flatten()]
