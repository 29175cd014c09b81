"""Advantages from token rewards: GAE, GRPO, RLOO and REINFORCE++.

All take token rewards and the response mask, each ``[B, T]`` (B responses of up to T tokens), and
give one advantage a token, ``[B, T]`` float32, 0 outside the mask. Rows of one prompt stand side by
side: row ``i * n + j`` is the j-th of the n = ``num_responses`` responses to prompt i, its *group*.

R is the reward of a whole response: the sum of its token rewards. A response that could not be
scored has no counted token; it leaves its group's baseline and has advantage 0.

What stands outside the mask (NaN included) does not count. A rollout's mask is one run of True from
the first token on; should there be a gap (a False between two True), gae and reinforce_pp end an
episode at it: the value after the last token before it is 0, and no token before it sees a reward
after it. grpo and rloo sum over all True tokens, wherever they stand.

Where this differs from the papers of grpo and rloo: a KL penalty is part of the token rewards,
hence of R, unless ``ppo.kl_in`` puts it into the loss, as GRPO has it; the loss is PPO's, token by
token, with its clip, and a mean over all tokens of the minibatch (GRPO averages each response
first; RLOO takes a response for one action, without a clip).
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tre_lightning.common.metrics import centred

Estimator: TypeAlias = Literal["gae", "grpo", "rloo", "reinforce_pp"]

_WITH_CRITIC = ("gae",)
_OF_A_GROUP = ("grpo", "rloo")


def check_estimator(estimator: Estimator, critic: str, num_responses: int) -> None:
    """Refuse an estimator that does not fit the model or the rollout.

    Raises:
        ValueError: if it has no critic and needs one, or the reverse, or a group is one response.
    """
    if estimator in _WITH_CRITIC and critic == "none":
        raise ValueError(
            f"model.policy.critic=none, but model.ppo.estimator={estimator} needs a critic; set "
            "critic to separate or shared, or estimator to grpo, rloo or reinforce_pp"
        )
    if estimator not in _WITH_CRITIC and critic != "none":
        raise ValueError(
            f"model.policy.critic={critic}, but model.ppo.estimator={estimator} uses no critic; "
            "set critic to none, or estimator to gae"
        )
    if estimator in _OF_A_GROUP and num_responses < 2:
        raise ValueError(
            f"model.rollout.num_responses={num_responses}, but model.ppo.estimator={estimator} "
            "compares the responses to a prompt; set num_responses to at least 2"
        )


def whitens(estimator: Estimator) -> bool:
    """Whether the estimator's paper whitens advantages over the batch; GRPO's does by group."""
    return estimator not in _OF_A_GROUP


def estimate(
    estimator: Estimator,
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    *,
    num_responses: int,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor | None]:
    """Advantages by this estimator, not whitened, and the critic's targets where there is one.

    Args:
        estimator: which one; :func:`gae` alone takes ``values`` and ``gae_lambda``, and
            :func:`grpo` and :func:`rloo`, of whole responses, do not discount.
        rewards: ``[B, T]``.
        values: the critic's, ``[B, T]``; None without a critic.
        mask: ``[B, T]`` bool.
        num_responses: n, rows of one prompt.
        gamma: discount a token.
        gae_lambda: lambda of generalised advantage estimation.
    """
    if estimator == "grpo":
        return grpo(rewards, mask, num_responses), None
    if estimator == "rloo":
        return rloo(rewards, mask, num_responses), None
    if estimator == "reinforce_pp":
        return reinforce_pp(rewards, mask, gamma=gamma), None
    assert values is not None  # check_estimator
    return gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016), all ``[B, T]``; 0 outside the mask.

    The value after the last token is 0: a response ends its episode, cut ones included.

    Returns:
        advantages, and returns = advantages + values.
    """
    # Not a product: 0 times NaN is NaN.
    values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def grpo(rewards: Tensor, mask: Tensor, num_responses: int, eps: float = 1e-6) -> Tensor:
    """Group relative advantages (Shao et al. 2024, arXiv 2402.03300), the same at every token.

    A = (R - mean) / (std + eps), over the scored responses of the group; std is the sample's, over
    n - 1, which the paper leaves open. A group of equal rewards, or with one scored response, has
    advantage 0. Whatever differs is scaled to one spread: where the scores of a group are equal, a
    KL penalty in the reward alone ranks its responses, however small its coefficient.
    """
    deviation, count = _deviation(rewards, mask, num_responses)
    variance = deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return _at_every_token(deviation / (variance.sqrt() + eps), mask)


def rloo(rewards: Tensor, mask: Tensor, num_responses: int) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740), the same at every token.

    A = R - mean of the other scored responses of the group = n / (n - 1) (R - mean of the group). A
    group with one scored response has no others, and advantage 0.
    """
    deviation, count = _deviation(rewards, mask, num_responses)
    return _at_every_token(deviation * count / (count - 1).clamp(min=1), mask)


def reinforce_pp(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) before its normalisation over the batch.

    A_t = sum over u >= t of gamma^(u - t) r_u: the discounted return to go, without a baseline.
    :func:`whitened` is the normalisation.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)
    return advantages


def whitened(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over the True entries of ``mask``; 0 elsewhere.

    Exactly 0 where all of them are equal, or none is True.
    """
    deviation, count = centred(values.flatten(), mask.flatten())
    variance = deviation.square().sum() / count.clamp(min=1)
    return (deviation * torch.rsqrt(variance + eps)).view_as(values).to(values.dtype)


def _deviation(rewards: Tensor, mask: Tensor, num_responses: int) -> tuple[Tensor, Tensor]:
    """R - mean of its group ``[B / n, n]`` (0 if not scored); scored responses ``[B / n, 1]``."""
    total = torch.where(mask, rewards, 0.0).sum(1, dtype=torch.float64).view(-1, num_responses)
    return centred(total, mask.any(1).view(-1, num_responses))


def _at_every_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """One advantage a response, ``[B / n, n]``, at each of its counted tokens, ``[B, T]``."""
    return advantages.float().view(-1, 1) * mask
