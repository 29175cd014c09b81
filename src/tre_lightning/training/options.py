"""Options of PPO, the optimiser and the diagnostics; each field states its unit."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from tre_lightning.batches import PromptBatch
from tre_lightning.common.seeding import permutation
from tre_lightning.common.validation import at_least, one_of, positive, unit_fraction
from tre_lightning.entropy import Region, check_region
from tre_lightning.training.advantages import Estimator
from tre_lightning.training.kl import KLEstimator, KLPlace, check_kl, next_kl_coef
from tre_lightning.training.micro_batches import PassLimit

MinibatchesBy: TypeAlias = Literal["response", "prompt"]
OldLogprobs: TypeAlias = Literal["sampler", "recompute"]
MICRO_BATCH_TOKENS = 2048  # of ppo.micro_batch_tokens, where nothing is given


@dataclass(frozen=True)
class PPOArgs:
    """Options of the PPO update.

    Args:
        estimator: of the advantages: ``gae`` (PPO's, with a critic), or one that needs
            policy.critic none: ``grpo`` or ``rloo`` (against the other responses to the prompt), or
            ``reinforce_pp`` (REINFORCE++: against the whole batch).
        num_epochs: passes over the rollout an iteration.
        num_minibatches: optimiser steps a pass.
        minibatches_by: what is shuffled and dealt out to minibatches: each ``response``, or each
            ``prompt`` with all its responses, which are then computed with one pass over the
            prompt.
        micro_batch_tokens: most tokens of one forward and backward pass on one device (one response
            always fits): those of responses and, once, of their prompts; of a model that cannot
            read rows side by side (docs/performance.md), responses x the columns of prompt,
            response and padding that the longest of them take; changes memory and speed, not the
            result; none = 2048, or any number where
            micro_batch_size is given.
        micro_batch_size: most responses of such a pass, whatever their length; none = any number.
        old_logprobs: log-probabilities by the policy before the update, and its entropies:
            ``sampler`` = as the engine ``in_process`` computed them while it sampled, ``recompute``
            = by passes over the rollout, as the update computes them; none = sampler where the two
            are equal but for rounding, docs/rollout.md says where. A method that compares with the
            initial policy always has them recomputed.
        clip_eps_low: the probability ratio is clipped at 1 - clip_eps_low; none = no lower bound.
        clip_eps_high: the probability ratio is clipped at 1 + clip_eps_high; none = no upper bound.
        dual_clip: where the advantage A is negative, the loss is at most this times -A, > 1; none =
            unbounded.
        value_clip_eps: values are clipped to this distance from the old ones; none = unclipped.
        value_coef: weight of the value loss, if there is a critic; matters for a shared trunk.
        gamma: discount per token; grpo and rloo do not discount.
        gae_lambda: lambda of generalised advantage estimation.
        whiten_advantages: zero mean and unit variance over the global batch; none = as the
            estimator's paper does: gae and reinforce_pp do, grpo and rloo do not.
        kl_coef: weight of the KL penalty against the reference (the initial policy); 0 = none.
        kl_estimator: estimator of that KL per token: ``k1`` (log ratio), ``k2`` (half its square)
            or ``k3``; docs/concepts.md says which one fits which ``kl_in``.
        kl_in: where the penalty goes: subtracted from the ``reward``, added to the ``loss`` (needs
            k2, or k3 as in GRPO), or added to the loss times the probability ratio,
            ``loss_weighted`` (k1 or k3).
        kl_target: KL to hold, nats a token as ``rollout/ref_kl``: the weight starts at kl_coef,
            rises while the KL is above the target and falls while it is below; none = constant.
        kl_horizon: responses in which a KL that is 20 % or more off its target changes the weight
            by 20 %.
        fused: compute log-probabilities and entropies by the fused ops, which never hold all the
            logits; false = by the readable reference (entropy.py), to check against.
        logits_memory: MiB of logits that the fused ops hold at a time.
        max_skipped_updates: optimiser steps in a row, over iterations too, that are skipped because
            a loss or a gradient is not finite; that many end the run.
    """

    estimator: Estimator = "gae"
    num_epochs: int = 1
    num_minibatches: int = 4
    minibatches_by: MinibatchesBy = "response"
    micro_batch_tokens: int | None = None
    micro_batch_size: int | None = None
    old_logprobs: OldLogprobs | None = None
    clip_eps_low: float | None = 0.2
    clip_eps_high: float | None = 0.2
    dual_clip: float | None = None
    value_clip_eps: float | None = 0.5
    value_coef: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 1.0
    whiten_advantages: bool | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k1"
    kl_in: KLPlace = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    fused: bool = True
    logits_memory: int = 128
    max_skipped_updates: int = 8

    def __post_init__(self) -> None:
        one_of("model.ppo.estimator", self.estimator, get_args(Estimator))
        one_of("model.ppo.minibatches_by", self.minibatches_by, get_args(MinibatchesBy))
        counts = ("num_epochs", "num_minibatches", "logits_memory", "max_skipped_updates")
        for name in (*counts, "micro_batch_tokens", "micro_batch_size"):
            if getattr(self, name) is not None:
                at_least(f"model.ppo.{name}", getattr(self, name), 1)
        for name in ("gamma", "gae_lambda"):
            unit_fraction(f"model.ppo.{name}", getattr(self, name))
        if self.clip_eps_low is not None and not 0.0 < self.clip_eps_low < 1.0:
            raise ValueError(f"model.ppo.clip_eps_low={self.clip_eps_low} must lie between 0 and 1")
        if self.clip_eps_high is not None:
            positive("model.ppo.clip_eps_high", self.clip_eps_high)
        if self.value_clip_eps is not None:
            positive("model.ppo.value_clip_eps", self.value_clip_eps)
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"model.ppo.dual_clip={self.dual_clip} must be above 1, or none")
        if not self.value_coef >= 0.0:
            raise ValueError(f"model.ppo.value_coef={self.value_coef} must be 0 (off) or positive")
        if self.old_logprobs is not None:
            one_of("model.ppo.old_logprobs", self.old_logprobs, get_args(OldLogprobs))
        self._check_kl()

    @property
    def pass_limit(self) -> PassLimit:
        """The most that a pass over rows takes, in the update and before it."""
        tokens, rows = self.micro_batch_tokens, self.micro_batch_size
        return PassLimit(MICRO_BATCH_TOKENS if tokens is None and rows is None else tokens, rows)

    def next_kl_coef(self, kl_coef: float, kl: float, responses: int) -> float:
        """The KL coefficient of the next iteration, after a rollout of that KL a token."""
        if self.kl_target is None:
            return kl_coef
        return next_kl_coef(
            kl_coef, kl, target=self.kl_target, responses=responses, horizon=self.kl_horizon
        )

    def _check_kl(self) -> None:
        if not 0.0 <= self.kl_coef < math.inf:
            raise ValueError(f"model.ppo.kl_coef={self.kl_coef} must be 0 (off) or positive")
        one_of("model.ppo.kl_estimator", self.kl_estimator, get_args(KLEstimator))
        one_of("model.ppo.kl_in", self.kl_in, get_args(KLPlace))
        check_kl(self.kl_estimator, self.kl_in)
        at_least("model.ppo.kl_horizon", self.kl_horizon, 1)
        if self.kl_target is None:
            return
        if not 0.0 < self.kl_target < math.inf:
            raise ValueError(f"model.ppo.kl_target={self.kl_target} must be above 0 nats, or none")
        if self.kl_coef == 0.0:
            raise ValueError(
                f"model.ppo.kl_target={self.kl_target} moves model.ppo.kl_coef by factors, and "
                "that is 0; give a kl_coef above 0 to start from"
            )


@dataclass(frozen=True)
class OptimArgs:
    """Options of the optimiser: AdamW with a group for the policy and one for the critic.

    Args:
        lr: peak learning rate of the policy.
        critic_lr: peak learning rate of the critic and the value head.
        warmup_iterations: PPO iterations of linear warm-up from 0.
        warmup_fraction: instead, linear warm-up over this fraction of the run's PPO iterations, in
            [0, 1].
        final_lr_fraction: learning rate at the last iteration as a fraction of the peak, with
            linear decay in between; 1 = constant.
        betas: of AdamW.
        eps: of AdamW; a larger one damps parameters whose gradients are tiny, such as the output
            rows of tokens that are never sampled.
        weight_decay: of AdamW.
        max_grad_norm: largest gradient norm of each group; larger gradients are scaled down to it.
    """

    lr: float = 1e-6
    critic_lr: float = 1e-5
    warmup_iterations: int = 0
    warmup_fraction: float = 0.0
    final_lr_fraction: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "critic_lr", "max_grad_norm"):
            positive(f"model.optim.{name}", getattr(self, name))
        for name in ("eps", "weight_decay", "final_lr_fraction"):
            at_least(f"model.optim.{name}", getattr(self, name), 0)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"model.optim.betas={self.betas} must each lie in [0, 1)")
        at_least("model.optim.warmup_iterations", self.warmup_iterations, 0)
        unit_fraction("model.optim.warmup_fraction", self.warmup_fraction)
        if self.warmup_iterations > 0 and self.warmup_fraction > 0.0:
            raise ValueError(
                f"give model.optim.warmup_iterations={self.warmup_iterations} or "
                f"model.optim.warmup_fraction={self.warmup_fraction}, not both; set the other to 0"
            )

    def check_end(self, *, known: bool) -> None:
        """Raise ValueError where a rate depends on the run's end, and that is not known."""
        if known:
            return
        if self.warmup_fraction > 0.0:
            raise ValueError(
                f"model.optim.warmup_fraction={self.warmup_fraction} needs a run with an end; give "
                "trainer.max_epochs, trainer.max_steps or model.optim.warmup_iterations"
            )
        if self.final_lr_fraction != 1.0:
            raise ValueError(
                f"model.optim.final_lr_fraction={self.final_lr_fraction} needs a run with an end; "
                "give trainer.max_epochs or trainer.max_steps, or 1 for a constant rate"
            )

    def lr_fraction(self, iteration: int, total_iterations: float) -> float:
        """Fraction of the peak learning rate at a PPO iteration.

        Raises:
            ValueError: for a fraction of a run without end.
        """
        self.check_end(known=math.isfinite(total_iterations))
        warmup = self.warmup_iterations
        if self.warmup_fraction > 0.0:
            warmup = round(self.warmup_fraction * total_iterations)
        if iteration < warmup:
            return (iteration + 1) / warmup
        left = max(total_iterations - warmup - 1, 1)
        done = min((iteration - warmup) / left, 1.0)  # 0 in a run without end
        return 1.0 - (1.0 - self.final_lr_fraction) * done


@dataclass(frozen=True)
class DiagnosticsArgs:
    """Options of the entropy diagnostics: their trust region, independent of the method's.

    Args:
        top_k: region of this many most probable tokens.
        top_p: region of the smallest nucleus of this mass.
        min_p: region of the tokens at least this many times as probable as the most probable one.
        fraction: of the responses, in (0, 1], drawn anew in every iteration, that the entropies are
            taken over.
    """

    top_k: int | None = None
    top_p: float | None = 0.99
    min_p: float | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_region(self.top_k, self.top_p, self.min_p, owner="model.diagnostics")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"model.diagnostics.fraction={self.fraction} must lie in (0, 1]")

    @property
    def region(self) -> Region:
        """The same as a region."""
        return Region(self.top_k, self.top_p, self.min_p)

    def rows(self, prompts: PromptBatch, num_responses: int, seed: int) -> Tensor:
        """Which responses to these prompts the entropies are taken over, ``[B * n]`` bool.

        The fraction is that of the global batch, and a row's number decides.
        """
        total, first = prompts.total_rows * num_responses, prompts.first_row * num_responses
        order = permutation(total, "diagnostics", seed, prompts.split, prompts.index)
        looked_at = torch.zeros(total, dtype=torch.bool)
        looked_at[order[: math.ceil(self.fraction * total)]] = True
        own = looked_at[first : first + len(prompts) * num_responses]
        return own.to(prompts.prompt_ids.device)
