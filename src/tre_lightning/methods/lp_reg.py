"""Lp-Reg: keep unlikely but plausible tokens from being trained away."""

import math

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region, check_region
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, Tokens
from tre_lightning.methods.selection import check_fraction, fraction_of, top
from tre_lightning.ops import PolicyOutputs

_FIRST = Region(top_k=1)
_LARGEST = 10.0  # of a token's penalty, as in the authors' code


class LpReg(LossTerm):
    """Low-probability regularisation: pull punished, unlikely tokens towards a min-p proxy.

    Source: "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable
    Reward", Huang et al. 2025, arXiv 2510.03222, with the authors' code (CarlanLark/Lp-Reg-dev,
    commit 33b27e2), from which the formulas are. The proxy is the policy that sampled over the
    tokens with p >= min_p * max p alone, renormalised. Of the tokens of negative advantage the
    ``fraction`` with the lowest log-probabilities are chosen; a chosen token that the proxy holds
    more probable than the policy in training does adds

        coef * (r - log r - 1), r = proxy / p, held at 10

    to the loss, the k3 estimate of a KL divergence, over all counted tokens. It pulls p up towards
    the proxy; a token that min-p filters out is left to its punishment.

    The authors' scripts: ``coef`` 1, ``min_p`` 0.02, ``fraction`` 0.01 (Qwen3-14B) and 0.005
    (Qwen2.5-32B), the ratio clipped at 10 alone, and chosen tokens not clipped at all. For negative
    advantages these are the same: ``configs/method/lp_reg.yaml`` sets
    ``model.ppo.clip_eps_low`` and ``dual_clip`` to null and ``clip_eps_high`` to 9.

    Deviations: the tokens are chosen by the policy that sampled, over the global minibatch; the
    authors choose by the policy in training (equal at the first update of an iteration), in one
    micro-batch of one device, where the choice acts only if it is of two tokens or more. Here it is
    of one at least. Equal log-probabilities are taken in the order of the minibatch's rows and then
    of their tokens. The authors' options for tokens of positive advantage and for a proxy with a
    fixed threshold or another temperature are left out.
    """

    def __init__(
        self,
        coef: float | LinearSchedule = 1.0,
        min_p: float = 0.02,
        fraction: float = 0.01,
        name: str = "lp_reg",
    ) -> None:
        """Set strength, proxy and choice.

        Args:
            coef: coefficient of the penalty, >= 0, or a schedule over iterations; 0 = off.
            min_p: the proxy holds the tokens at least this many times as probable as the most
                probable one, above 0 and below 1.
            fraction: fraction of the tokens of negative advantage, those of lowest probability,
                above 0 and at most 1.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_region(min_p=min_p, owner=self.where)
        check_fraction(f"{self.where}.fraction", fraction, "coef=0 switches it off")
        self.min_p = min_p
        self.fraction = fraction
        self.region = Region(min_p=min_p)
        self.observed_regions = (self.region, _FIRST)

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Log-probability of the token by the proxy, ``[n]`` nats; -inf = filtered out."""
        largest = torch.log1p(-outputs.entropy(_FIRST).tail_mass)
        inside = outputs.logprobs >= largest + math.log(self.min_p)
        mass = torch.log1p(-outputs.entropy(self.region).tail_mass)
        return (outputs.logprobs - mass).where(inside, -math.inf)

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """The penalty, ``[n]``; 0 at a token that the proxy does not hold more probable."""
        target = tokens.observed[self.name].maximum(outputs.logprobs.detach())
        gap = (target - outputs.logprobs).clamp(max=_LARGEST)  # beyond it, exp may overflow
        return (gap.exp() - gap - 1.0).clamp(max=_LARGEST)

    def token_weights(self, minibatch: TrainingBatch) -> Tensor:
        """1 at the chosen tokens, else 0, ``[B, T]``."""
        punished = minibatch.response_mask & (minibatch.advantages < 0.0)
        count = fraction_of(int(punished.sum()), self.fraction)
        return top(-minibatch.old_logprobs, punished, count).to(minibatch.advantages)
