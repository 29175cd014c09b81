"""Metrics of a run as collections of torchmetrics; docs/metrics.md defines every tag."""

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from lightning.fabric.loggers.logger import Logger
from torch import Tensor, nn
from torchmetrics import Metric

from tre_lightning.batches import Experience, Rollout, TrainingBatch
from tre_lightning.common.distributed import agreed
from tre_lightning.common.metrics import (
    MajorityAtK,
    MaskedExplainedVariance,
    MaskedMean,
    Maximum,
    PassAtK,
    StandardError,
    Total,
    cumulative_tail_risk,
    majority_by_prompt,
    number_answers,
    pass_at_k_by_prompt,
)
from tre_lightning.entropy import EntropyStats
from tre_lightning.methods.hooks import LossTerm, Method
from tre_lightning.training.losses import approx_kl, clipped, policy_ratio
from tre_lightning.training.objective import Losses


class _Collection(nn.Module):
    """Named metrics that are computed and reset together."""

    def __init__(self, metrics: dict[str, Metric]) -> None:
        super().__init__()
        # Module names may not hold dots or collide with attributes, so the tags stay a list.
        self.tags = list(metrics)
        self.metrics = nn.ModuleList(metrics.values())

    def __getitem__(self, tag: str) -> Metric:
        metric = self.metrics[self.tags.index(tag)]
        assert isinstance(metric, Metric)
        return metric

    def flush(self) -> dict[str, float]:
        """Values over all ranks, then reset; metrics without updates are left out. Collective."""
        used = [tag for tag in self.tags if self[tag].update_called]
        values = {tag: float(self[tag].compute()) for tag in used}
        for tag in used:
            self[tag].reset()
        return values


class RolloutMetrics(_Collection):
    """Scores and entropies of this rank's responses, before the update."""

    def __init__(self, num_responses: int) -> None:
        """``num_responses`` is k of the reported pass@k."""
        self.num_responses = num_responses
        tokens = ["full", "region", "region_scaled", "region_size", "single_token_fraction"]
        super().__init__(
            {
                "rollout/score": MaskedMean(),
                **{f"rollout/pass@{k}": PassAtK(k) for k in sorted({1, num_responses})},
                "rollout/response_length": MaskedMean(),
                "rollout/finished_fraction": MaskedMean(),
                "rollout/unscorable_fraction": MaskedMean(),
                "rollout/scorer_timeouts": Total(),
                "rollout/ref_kl": MaskedMean(),
                **{f"entropy/{name}": MaskedMean() for name in tokens},
                "entropy/tail_mass": MaskedMean(),
                "entropy/cumulative_tail_risk": MaskedMean(),
                "policy/evaluation_padding_fraction": MaskedMean(),
            }
        )

    def update_scores(self, experience: Experience, *, binary: bool = True) -> None:
        """Count one rollout (rows of one prompt side by side); pass@k of ``binary`` scores only."""
        grouped = experience.scores.view(-1, self.num_responses)
        scored = ~experience.scores.isnan()
        self["rollout/score"].update(experience.scores, scored)
        for k in sorted({1, self.num_responses}) if binary else ():
            self[f"rollout/pass@{k}"].update(grouped)
        self["rollout/response_length"].update(experience.response_mask.sum(1), scored)
        self["rollout/finished_fraction"].update(experience.finished)
        self["rollout/unscorable_fraction"].update(~scored)
        if experience.ref_logprobs is not None:
            kl = approx_kl(experience.ref_logprobs, experience.old_logprobs)
            self["rollout/ref_kl"].update(kl, experience.response_mask)

    def update_timeouts(self, count: int | None) -> None:
        """Count the answers whose scoring timed out; None = a scorer without time limit."""
        if count is not None:
            self["rollout/scorer_timeouts"].update(count)

    def update_padding(self, padding: Tensor) -> None:
        """Count the columns of the passes over the rollout, if there are any; True = padding."""
        if padding.numel() > 0:
            self["policy/evaluation_padding_fraction"].update(padding)

    def update_entropy(self, stats: EntropyStats, mask: Tensor) -> None:
        """Count the entropies of some responses, ``[B, T]`` each."""
        self["entropy/full"].update(stats.full, mask)
        self["entropy/region"].update(stats.region, mask)
        self["entropy/region_scaled"].update(stats.scaled, mask)
        self["entropy/region_size"].update(stats.size, mask)
        self["entropy/single_token_fraction"].update(stats.size == 1, mask)
        self["entropy/tail_mass"].update(stats.tail_mass, mask)
        self["entropy/cumulative_tail_risk"].update(cumulative_tail_risk(stats.tail_mass, mask))


class UpdateMetrics(_Collection):
    """Losses, step sizes and critic of one iteration's updates."""

    def __init__(self) -> None:
        """Losses are sums over micro-batches and ranks; ``flush`` of them is a mean per step."""
        super().__init__(
            {
                "rollout/engine_kl": MaskedMean(),
                "rollout/engine_ratio_max": Maximum(),
                "policy/approx_kl": MaskedMean(),
                "policy/clip_fraction": MaskedMean(),
                "policy/active_fraction": MaskedMean(),
                "policy/padding_fraction": MaskedMean(),
                "policy/grad_norm": MaskedMean(),
                "value/grad_norm": MaskedMean(),
                "value/explained_variance": MaskedExplainedVariance(),
                "value/mean": MaskedMean(),
                "value/return_mean": MaskedMean(),
            }
        )
        self.losses = nn.ModuleDict()
        self.parts: dict[str, Tensor] = {}  # this rank's parts of the losses of the present update
        self.steps = 0
        self.skipped = 0  # all ranks skip alike
        self.engine_known = False  # how far it is from the policy, in this iteration

    def update_engine(self, logprobs: Tensor, batch: Rollout) -> None:
        """Count how far the policy's ``logprobs``, ``[B, T]``, are from those of what sampled."""
        behaviour, mask = batch.behaviour_logprobs, batch.response_mask
        if behaviour is not None:
            self["rollout/engine_kl"].update(approx_kl(logprobs, behaviour), mask)
            ratio = policy_ratio(logprobs, behaviour)
            self["rollout/engine_ratio_max"].update(ratio[mask])

    def update_rollout(self, experience: Experience) -> None:
        """Count that of the whole rollout; else it is counted in the iteration's first update."""
        self.update_engine(experience.old_logprobs, experience)
        self.engine_known = True

    def update_targets(self, batch: TrainingBatch) -> None:
        """Count the critic's predictions of the whole (global) rollout, if there is a critic."""
        if batch.values is None or batch.returns is None:
            return
        mask = batch.response_mask
        self["value/explained_variance"].update(batch.values, batch.returns, mask)
        self["value/mean"].update(batch.values, mask)
        self["value/return_mean"].update(batch.returns, mask)

    def update(
        self,
        losses: Losses,
        batch: TrainingBatch,
        clip_eps_low: float | None,
        clip_eps_high: float | None,
        *,
        packed: bool = False,
    ) -> None:
        """Count a micro-batch of this rank: losses, how far the policy has moved, padding."""
        for name, part in losses.parts.items():
            self.add_loss(name, part)
        if not self.engine_known and self.steps == self.skipped == 0:
            self.update_engine(losses.logprobs, batch)
        self["policy/padding_fraction"].update(batch.padding(packed=packed))
        self.update_policy(losses.logprobs, batch, clip_eps_low, clip_eps_high)

    def update_policy(
        self,
        logprobs: Tensor,
        batch: TrainingBatch,
        clip_eps_low: float | None,
        clip_eps_high: float | None,
    ) -> None:
        """Count one micro-batch of this rank."""
        logprobs = logprobs.detach()
        ratio = policy_ratio(logprobs, batch.old_logprobs)
        hit = clipped(ratio, batch.advantages, clip_eps_low, clip_eps_high)
        self["policy/approx_kl"].update(
            approx_kl(logprobs, batch.old_logprobs), batch.response_mask
        )
        self["policy/clip_fraction"].update(hit, batch.response_mask)

    def update_weights(self, minibatch: TrainingBatch) -> None:
        """Count the weights of the policy loss in a whole (global) minibatch."""
        if "policy" in minibatch.weights:
            active = minibatch.weights["policy"] != 0
            self["policy/active_fraction"].update(active, minibatch.response_mask)

    def add_loss(self, name: str, part: Tensor) -> None:
        """Add a part of a loss, already divided by the minibatch's global token count."""
        self.parts[name] = self.parts.get(name, 0.0) + part.detach()

    def end_step(self, policy_norm: Tensor, critic_norm: Tensor | None = None) -> None:
        """Count one optimiser step and its gradient norms before clipping."""
        self["policy/grad_norm"].update(policy_norm)
        if critic_norm is not None:
            self["value/grad_norm"].update(critic_norm)
        for name, part in self.parts.items():
            if name not in self.losses:
                self.losses[name] = Total().to(part.device)
            loss = self.losses[name]
            assert isinstance(loss, Total)
            loss.update(part)
        self.parts = {}
        self.steps += 1

    def skip_step(self) -> None:
        """Count an update that was skipped; its losses and gradient norms do not count."""
        self.parts = {}
        self.skipped += 1

    def flush(self) -> dict[str, float]:
        """Values over all ranks, then reset. Collective."""
        values = super().flush()
        if values.get("rollout/engine_ratio_max") == -math.inf:  # of no token
            values["rollout/engine_ratio_max"] = math.nan
        for name, loss in self.losses.items():
            assert isinstance(loss, Total)
            # A tag once logged goes on: Lightning would repeat its last value.
            counted = loss.update_called  # not where the coefficient is 0 by now
            none = 0.0 if self.steps else math.nan
            values[f"loss/{name}"] = float(loss.compute()) / self.steps if counted else none
            loss.reset()
        values["policy/skipped_updates"] = float(self.skipped)
        self.steps = self.skipped = 0
        self.engine_known = False
        return values


def method_values(methods: Sequence[Method], scales: Mapping[str, float]) -> dict[str, float]:
    """Coefficients and other numbers of the methods, to be logged beside the losses of the update.

    Args:
        methods: after the updates of an iteration.
        scales: mean of :meth:`LossTerm.scale` over the rollout, by the term's name.
    """
    values: dict[str, float] = {}
    for method in methods:
        name = f"loss/{method.name}"
        if isinstance(method, LossTerm):
            coef = float(method.current_coef)
            values[f"{name}_coef"] = coef
            values[f"{name}_effective_coef"] = coef * scales[method.name]
            if coef == 0.0:  # no update has it; a run that goes on logs what the whole run did
                values[name] = 0.0
        values |= {f"{name}_{key}": float(value) for key, value in method.logged().items()}
    return values


def write(values: dict[str, float], loggers: Sequence[Logger], step: int) -> None:
    """Log an iteration before its checkpoint; Lightning would after it, and a kill lose it."""
    with agreed():  # the first rank alone writes
        for logger in loggers:
            logger.log_metrics(values, step=step)
            logger.save()


class EvaluationMetrics(_Collection):
    """Scores of the responses to held-out prompts."""

    def __init__(self, num_responses: int) -> None:
        """``num_responses`` is k of the reported pass@k and majority@k."""
        self.num_responses = num_responses
        self.passes = {f"pass@{k}": k for k in sorted({1, num_responses})}
        self.majority = f"majority@{num_responses}"
        means: dict[str, Metric] = {
            "score": MaskedMean(),
            **{tag: PassAtK(k) for tag, k in self.passes.items()},
            self.majority: MajorityAtK(),
            "response_length": MaskedMean(),
        }
        errors = {f"{tag}_se": StandardError() for tag in means}
        fractions = {"finished_fraction": MaskedMean(), "invalid_fraction": MaskedMean()}
        super().__init__({**means, **fractions, **errors})

    def update(
        self,
        scores: Tensor,
        response_mask: Tensor,
        finished: Tensor,
        invalid: Tensor,
        *,
        binary: bool = True,
        answers: Sequence[Hashable | None] | None = None,
        standard_errors: bool = False,
    ) -> None:
        """Count some responses, rows of one prompt side by side.

        Args:
            scores: NaN = could not be scored, ``[G * n]``.
            response_mask: bool, True = counts, ``[G * n, T]``.
            finished: bool, whether a response ended by itself, ``[G * n]``.
            invalid: bool, whether a response has an invalid token, ``[G * n]``.
            binary: whether pass@k means something.
            answers: what each response answers, None = nothing; None = no such thing in this task.
            standard_errors: whether to count those of the means, too.
        """
        grouped, lengths = scores.view(-1, self.num_responses), response_mask.sum(1)
        self["score"].update(scores, ~scores.isnan())
        self["response_length"].update(lengths)
        self["finished_fraction"].update(finished)
        self["invalid_fraction"].update(invalid)
        by_prompt = {
            "score": grouped.double().nanmean(1),
            "response_length": lengths.view_as(grouped).double().mean(1),
        }
        for tag, k in self.passes.items() if binary else ():
            self[tag].update(grouped)
            by_prompt[tag] = pass_at_k_by_prompt(grouped, k)
        if answers is not None:
            numbers = number_answers(answers, self.num_responses).to(scores.device)
            self[self.majority].update(grouped, numbers)
            by_prompt[self.majority] = majority_by_prompt(grouped, numbers)
        for tag, values in by_prompt.items() if standard_errors else ():
            self[f"{tag}_se"].update(values)

    def flush(self) -> dict[str, float]:
        """Values over all ranks, then reset; no standard errors of a single prompt. Collective."""
        values = super().flush()
        return {
            tag: value
            for tag, value in values.items()
            if not (tag.endswith("_se") and math.isnan(value))
        }


class Evaluations(nn.Module):
    """:class:`EvaluationMetrics` of every held-out set, by its name."""

    def __init__(self, num_responses: int) -> None:
        """``num_responses`` is k of the reported pass@k and majority@k."""
        super().__init__()
        self.num_responses = num_responses
        self.sets = nn.ModuleDict()

    def of(self, split: str, device: torch.device) -> EvaluationMetrics:
        """The metrics of a set, made at first use."""
        if split not in self.sets:
            self.sets[split] = EvaluationMetrics(self.num_responses).to(device)
        metrics = self.sets[split]
        assert isinstance(metrics, EvaluationMetrics)
        return metrics

    def flush(self) -> dict[str, float]:
        """Values of every set over all ranks, as ``set/tag``, then reset. Collective."""
        values: dict[str, float] = {}
        for split, metrics in self.sets.items():
            assert isinstance(metrics, EvaluationMetrics)
            values |= {f"{split}/{tag}": value for tag, value in metrics.flush().items()}
        return values
