"""The KL penalty, which keeps the policy pi near the reference (the initial policy).

Three estimates of KL(pi || ref) from a sampled token, with l = log pi - log ref of that token
(Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html):

    k1 = l        k2 = l^2 / 2        k3 = exp(-l) - 1 + l

As *values* k1 and k3 are unbiased, and k3 is never negative, which is why it is the one that is
logged; k2 is biased. A *penalty* acts by its gradient, which is another question and depends on
where the estimate stands:

* ``reward``: kl_coef * k is taken off the token's reward. It is a constant there, of which the
  policy gradient makes E[k grad log pi].
* ``loss``: kl_coef * (mean k over the counted tokens) is added to the loss, and k differentiated.
* ``loss_weighted``: the same of (pi / pi_old) * k, the ratio differentiated too.

What the gradient is on average, for each token at the policy that sampled (pi = pi_old):

==  =====================================  =====================  ========================
..  reward                                 loss                   loss_weighted
==  =====================================  =====================  ========================
k1  grad KL(pi || ref)                     0; refused             grad KL(pi || ref)
k2  neither: grad E[k2] - grad KL(pi||ref) grad KL(pi || ref)     neither: grad E[k2]; refused
k3  grad KL(pi||ref) - grad KL(ref||pi)    grad KL(ref || pi)     grad KL(pi || ref)
==  =====================================  =====================  ========================

k2 and k3 in the reward do not hold a policy: near the reference, where both divergences are alike,
their gradient vanishes or points away. They are here to reproduce code that has them.

Where the columns differ besides:

* Over a response, ``reward`` is the gradient of the whole response's KL (of the sum over its
  tokens, what a token does to the later ones included) for gamma = gae_lambda = 1. The two losses
  take the positions as they were sampled: of each token its own KL, a partial gradient.
* After the first update of an iteration pi is no longer pi_old. ``reward`` is then corrected and
  clipped as PPO does it; ``loss`` is biased; ``loss_weighted`` stays exact at each position.
* ``reward`` goes through what is done to advantages: whitening, the division by the spread of a
  group (grpo), weights of tokens in the policy loss. The losses keep their scale next to the score
  whatever it is; their mean is over all counted tokens.

Sources: Schulman 2020; k3 as a loss is GRPO's (Shao et al. 2024, arXiv 2402.03300, eq. 4);
``loss_weighted`` with k3 is DeepSeek-V3.2's; Tang and Munos 2025, arXiv 2506.09477, and Liu et al.
2025, arXiv 2510.01555, on which of these gradients is which.
"""

import math
from typing import Literal, TypeAlias

from torch import Tensor

from tre_lightning.training.losses import approx_kl, policy_ratio

KLEstimator: TypeAlias = Literal["k1", "k2", "k3"]
KLPlace: TypeAlias = Literal["reward", "loss", "loss_weighted"]

_WITHOUT_USE = {
    ("k1", "loss"): "has a gradient of 0 on average; give kl_estimator k2 or k3, or kl_in reward "
    "or loss_weighted",
    ("k2", "loss_weighted"): "has a gradient that is not that of a KL; give kl_estimator k3, or "
    "kl_in loss",
}


def check_kl(estimator: KLEstimator, place: KLPlace) -> None:
    """Raise ValueError for an estimator that has no use in its place."""
    why = _WITHOUT_USE.get((estimator, place))
    if why is not None:
        raise ValueError(f"model.ppo.kl_estimator={estimator} with model.ppo.kl_in={place} {why}")


def kl_estimate(estimator: KLEstimator, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) of each token, nats, shape of the inputs; differentiable.

    Args:
        estimator: which one; the module says what it is unbiased for.
        logprobs: log pi of the tokens, any shape.
        ref_logprobs: log ref of the same.
    """
    if estimator == "k3":
        return approx_kl(ref_logprobs, logprobs)
    log_ratio = logprobs - ref_logprobs
    return log_ratio if estimator == "k1" else 0.5 * log_ratio.square()


def kl_loss(
    estimator: KLEstimator,
    place: KLPlace,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
) -> Tensor:
    """Penalty of each token as a term of the loss, nats, ``[n]``; differentiable.

    Args:
        estimator: which estimate.
        place: ``loss`` or ``loss_weighted``.
        logprobs: log pi of the policy in training, ``[n]``.
        old_logprobs: of the policy that sampled, ``[n]``.
        ref_logprobs: of the reference, ``[n]``.
    """
    estimate = kl_estimate(estimator, logprobs, ref_logprobs)
    if place == "loss":
        return estimate
    return policy_ratio(logprobs, old_logprobs) * estimate


def next_kl_coef(coef: float, kl: float, *, target: float, responses: int, horizon: int) -> float:
    """The KL coefficient of the next iteration, adapted to hold the KL at a target.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon), the proportional controller
    of Ziegler et al. 2019, arXiv 1909.08593, section 2.2, in the form of their code.

    Deviations: the KL is the mean over the tokens of a rollout, the logged ``rollout/ref_kl``;
    theirs is a mean over responses, of sums of k1. responses / horizon is at most 1.

    Args:
        coef: of this iteration, > 0.
        kl: of this iteration's rollout, nats a token; NaN (nothing counted) leaves ``coef`` as is.
        target: nats a token, > 0.
        responses: of the rollout, over all devices.
        horizon: responses after which a KL that is 20 % or more off has moved ``coef`` by 20 %.
    """
    if math.isnan(kl):
        return coef
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * min(responses / horizon, 1.0))
