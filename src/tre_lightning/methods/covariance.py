"""Entropy control through the tokens whose log-probability covaries most with the advantage.

Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", Cui et al.
2025, arXiv 2505.22617, with the authors' code (PRIME-RL/Entropy-Mechanism-of-RL; the same in verl).
A policy-gradient step lowers the entropy by about the covariance of log-probability and advantage,
and a few tokens make most of it:

    cov_i = (log p_i - mean log p) * (A_i - mean A)

Deviation: the authors take the log-probabilities of the policy in training, and means and fractions
over one micro-batch of one device. Here they are those of the policy that sampled (equal at the
first update of an iteration), and means and fractions are over the global minibatch, so that
neither micro-batches nor devices change the choice.
"""

from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.common.metrics import centred
from tre_lightning.common.seeding import uniforms
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, Method, Tokens
from tre_lightning.methods.selection import check_fraction, fraction_of, top
from tre_lightning.ops import PolicyOutputs


def covariances(batch: TrainingBatch) -> Tensor:
    """Each counted token's term of the covariance, nats x advantage, ``[B, T]``; 0 elsewhere."""
    mask = batch.response_mask.flatten()
    logprobs, _ = centred(batch.old_logprobs.flatten(), mask)
    advantages, _ = centred(batch.advantages.flatten(), mask)
    return (logprobs * advantages).view_as(batch.advantages).to(batch.advantages.dtype)


class KLCov(LossTerm):
    """KL-Cov: hold the tokens of largest covariance near the policy that sampled.

    Adds coef * |log p - log p_old| to the loss of the ``fraction`` of tokens with the largest
    covariance, floor(fraction * n) of the n counted ones, at least 1; the divisor stays n.

    The authors' code has coef 1 and fraction 0.0002 as defaults; their scripts take fraction 0.002
    for 7B and 0.0002 for 32B. It clips no token at all: ``configs/method/kl_cov.yaml`` therefore
    sets ``model.ppo.clip_eps_low``, ``clip_eps_high`` and ``dual_clip`` to null. The TRE paper's
    baseline (arXiv 2602.03635, its code) is another: it keeps the clipped surrogate (0.2 and 0.2,
    dual clip 3) on every token and adds the same term, coef 1, fraction 0.002. That is this class
    with ``model.ppo.clip_eps_low`` and ``clip_eps_high`` 0.2 and ``dual_clip`` 3.

    At the first update of an iteration log p = log p_old, where the gradient of the term is 0: with
    one update an iteration KL-Cov does nothing. Further on its size does not matter, only its sign:
    a difference that is mere rounding (other padding, bfloat16) pulls as hard as a real one. That
    is so in the authors' code, too.

    Deviations: those of the module, none else. Equal covariances are taken in the order of the
    minibatch's rows and then of their tokens; the authors leave that to ``torch.topk``.
    """

    def __init__(
        self,
        coef: float | LinearSchedule = 1.0,
        fraction: float = 0.0002,
        name: str = "kl_cov",
    ) -> None:
        """Set coefficient and fraction.

        Args:
            coef: coefficient of the penalty, >= 0, or a schedule over iterations; 0 = off.
            fraction: fraction of the tokens that are held, above 0, at most 1.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_fraction(f"{self.where}.fraction", fraction, "coef=0 switches it off")
        self.fraction = fraction

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Absolute difference to the old log-probability, ``[n]`` nats."""
        return (outputs.logprobs - tokens.old_logprobs).abs()

    def token_weights(self, minibatch: TrainingBatch) -> Tensor:
        """1 at the largest covariances, else 0, ``[B, T]``."""
        mask = minibatch.response_mask
        chosen = top(covariances(minibatch), mask, fraction_of(int(mask.sum()), self.fraction))
        return chosen.to(minibatch.advantages)


class ClipCov(Method):
    """Clip-Cov: leave some tokens of high covariance out of the policy gradient.

    Weight 0 in the policy loss for floor(fraction * n) of the n counted tokens, at least 1, drawn
    at random among those with low < covariance < high, or for all of these where they are fewer; 1
    for the rest. The divisor stays n.

    The authors' code has fraction 0.0002, low 1 and high 5 as defaults. The band is in nats x
    advantage, for advantages of unit variance: it fits ``ppo.whiten_advantages`` on. The authors'
    scripts (7B and 32B) leave hardly any other clipping, the ratio being held in [0, 2]:
    ``configs/method/clip_cov.yaml`` sets ``model.ppo.clip_eps_low`` to null and ``clip_eps_high``
    to 1.

    Deviations: those of the module; and the authors draw among the tokens that PPO's own clipping
    leaves, while here the tokens are drawn before the update, when no token is known to be clipped
    (again equal at the first update of an iteration).
    """

    def __init__(
        self,
        fraction: float = 0.0002,
        low: float = 1.0,
        high: float = 5.0,
        name: str = "clip_cov",
    ) -> None:
        """Set the fraction and the band.

        Args:
            fraction: fraction of the tokens that are left out, from 0 (off) to 1.
            low: lower bound of their covariance.
            high: upper bound of their covariance, above ``low``.
            name: name in the logs.
        """
        super().__init__(name)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(
                f"{self.where}.fraction={fraction} must lie in [0, 1]; 0 switches it off"
            )
        if not low < high:
            raise ValueError(f"{self.where}.low={low} must be below high={high}; widen the band")
        self.fraction = fraction
        self.low = low
        self.high = high

    def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> Tensor | None:
        """0 at the tokens drawn, else 1, ``[B, T]``; None where ``fraction`` is 0."""
        if self.fraction == 0.0:
            return None
        mask, parts = minibatch.response_mask, covariances(minibatch)
        band = mask & (parts > self.low) & (parts < self.high)
        draws = uniforms(*mask.shape, *key).to(mask.device)
        out = top(draws, band, fraction_of(int(mask.sum()), self.fraction))
        return (~out).to(minibatch.advantages)
