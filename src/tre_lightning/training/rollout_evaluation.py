"""What the models say of a rollout before the update: the arrow from a rollout to an experience.

Nothing is computed twice. The sampler has had the logits of every token in its hands: where it is
exact, log-probabilities, entropies and what methods observe come from there, and only critic and
reference read the rollout again.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tre_lightning.batches import Experience, Rollout
from tre_lightning.common.distributed import highest
from tre_lightning.common.metrics import MaskedMean
from tre_lightning.entropy import EntropyStats
from tre_lightning.methods.hooks import Method, loss_terms
from tre_lightning.ops import PolicyOutputs, Region
from tre_lightning.policy.actor_critic import ActorCritic
from tre_lightning.policy.head import HeadOptions, head_outputs
from tre_lightning.policy.sharding import is_sharded
from tre_lightning.sampling.options import RolloutArgs
from tre_lightning.training.micro_batches import PassLimit, passes_of, passes_over
from tre_lightning.training.objective import asked_by
from tre_lightning.training.options import PPOArgs
from tre_lightning.training.reference import Reference
from tre_lightning.training.targets import build_experience


def check_old_logprobs(ppo: PPOArgs, rollout: RolloutArgs) -> None:
    """Refuse log-probabilities of the sampler where it has none, or where they must be others.

    Raises:
        ValueError: naming the fields, their values and the fix.
    """
    if ppo.old_logprobs != "sampler":
        return
    if rollout.engine != "in_process":
        raise ValueError(
            "model.ppo.old_logprobs=sampler needs the logits of model.rollout.engine=in_process, "
            f"not {rollout.engine}; set it to recompute"
        )
    if rollout.corrects:
        raise ValueError(
            f"model.rollout.max_importance_weight={rollout.max_importance_weight}, "
            f"min_importance_weight={rollout.min_importance_weight} compare the sampler with the "
            "policy, which are one with model.ppo.old_logprobs=sampler; set that to recompute"
        )


def taken_from_sampler(
    ppo: PPOArgs, rollout: RolloutArgs, methods: Sequence[Method], model: ActorCritic
) -> bool:
    """Whether what the policy says of its tokens is kept while it samples, and not recomputed.

    By default where the sampler is exact: this package's own, on whole weights, with all products
    in float32 or better. Call it where the policy will run: the answer depends on autocast.
    """
    if ppo.old_logprobs == "recompute" or any(method.needs_reference for method in methods):
        return False  # a reference is not at hand while the policy samples
    if ppo.old_logprobs == "sampler":
        return True
    weights = [p for p in model.policy.parameters() if p.is_floating_point()]
    return (
        rollout.engine == "in_process"
        and not rollout.corrects
        and not is_sharded(model)
        and not torch.is_autocast_enabled(weights[0].device.type)
        and torch.get_float32_matmul_precision() == "highest"
        and all(p.element_size() >= 4 for p in weights)
    )


class PolicyRecord:
    """What the policy that sampled says of the tokens of a rollout, collected from parts of them.

    A part is a step of the sampler or a pass over some rows; each token must come once.
    """

    def __init__(
        self, methods: Sequence[Method], options: HeadOptions, region: Region, looked_at: Tensor
    ) -> None:
        """Without anything yet.

        Args:
            methods: those of the run, which observe it.
            options: what is asked of the head but for regions and logits.
            region: that of the diagnostics.
            looked_at: rows that the diagnostics take, ``[B]`` bool.
        """
        observed = [each for method in methods for each in method.observed_regions]
        self.methods, self.region, self.looked_at = methods, region, looked_at
        # Of the reference, only what is asked for: mostly log-probabilities alone.
        self.of_reference = asked_by([m for m in methods if m.needs_reference], options)
        others = asked_by(methods, options, *observed)
        self._asked = {True: asked_by(methods, options, region, *observed), False: others}
        # Of which rows the region is asked: of all, where a method does so anyway.
        of_all = torch.ones_like(looked_at)
        self._with_region = of_all if region in others.regions else looked_at
        self._scales = {t.name: MaskedMean().to(looked_at.device) for t in loss_terms(methods)}
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # not looked at so far

    @property
    def is_filled(self) -> bool:
        """Whether anything has come."""
        return bool(self._parts or self._steps)

    def groups(self) -> list[tuple[Tensor, HeadOptions]]:
        """Row numbers, and what the head is asked of them; each row is in one of the two."""
        return [
            ((self._with_region == with_region).nonzero().squeeze(1), asked)
            for with_region, asked in self._asked.items()
        ]

    def step(self, rows: Tensor, column: int, tokens: Tensor, logits: Tensor) -> None:
        """Take a step of the sampler; the arguments are a ``Recorder``'s."""
        self._steps.append((rows, torch.full_like(rows, column), tokens, logits))
        if sum(part[-1].nbytes for part in self._steps) >= self._asked[True].memory:
            self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Steps are looked at together: towards a rollout's end each has few rows."""
        steps = [torch.cat(parts) for parts in zip(*self._steps, strict=True)]
        self._steps = []
        for with_region, asked in self._asked.items():
            chosen = self._with_region[steps[0]] == with_region
            if chosen.any():
                rows, columns, tokens, logits = (
                    steps if chosen.all() else [s[chosen] for s in steps]
                )
                self.add(head_outputs(logits, None, tokens, asked), None, rows, columns)

    def add(
        self, outputs: PolicyOutputs, seen: PolicyOutputs | None, rows: Tensor, columns: Tensor
    ) -> None:
        """Take the outputs of n tokens.

        Args:
            outputs: the policy's.
            seen: the reference's, where a method needs them.
            rows: of the rollout, ``[n]``.
            columns: positions in the response, ``[n]``.
        """
        keep = partial(self.keep, rows=rows, columns=columns)
        keep("old_logprobs", outputs.logprobs)
        if self.region in outputs.entropies:
            # Sizes as floats.
            keep("entropies", torch.stack(list(outputs.entropy(self.region)), dim=-1))
        for method in self.methods:
            kept = method.observe(outputs, seen)
            if kept is not None:
                keep(f"observed/{method.name}", kept)
        for term in loss_terms(self.methods):
            self._scales[term.name].update(term.scale(outputs))

    def keep(self, name: str, values: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Keep numbers ``[n, ...]`` of n tokens under a name."""
        self._parts.setdefault(name, []).append((rows, columns, values))

    def columns(self, mask: Tensor) -> dict[str, Tensor]:
        """All that is kept, ``[B, T, ...]`` each, 0 where there is none; ``mask`` is ``[B, T]``."""
        if self._steps:
            self._look()
        found = {}
        for name, parts in self._parts.items():
            rows, columns, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            found[name] = values.new_zeros(mask.shape + values.shape[1:])
            found[name][rows, columns] = values
        return found

    def scales(self) -> dict[str, float]:
        """Mean of each loss term's ``scale`` over all ranks, by its name. Collective."""
        return {name: float(scale.compute()) for name, scale in self._scales.items()}


class EvaluatedRollout(NamedTuple):
    """A rollout under the policy that sampled it."""

    experience: Experience
    entropies: EntropyStats  # [B, T] each, of the region of the diagnostics
    looked_at: Tensor  # [B, T] bool, the tokens that have entropies
    scales: Mapping[str, float]  # mean of each loss term's ``scale`` over all ranks, by its name
    padding: Tensor  # [columns of all passes together] bool, True = computed for nothing


@torch.no_grad()
def evaluate_rollout(
    rollout: Rollout,
    scores: Tensor,
    record: PolicyRecord,
    model: ActorCritic,
    reference: Reference | None,
    limit: PassLimit,
) -> EvaluatedRollout:
    """Log-probabilities, values and entropies of this rank's responses, and what methods observe.

    Args:
        rollout: B responses.
        scores: ``[B]``; NaN = could not be scored.
        record: of the policy; filled here unless the sampler has done that.
        model: the policy that sampled, and its critic.
        reference: the initial policy, where it is wanted.
        limit: of one pass.
    """
    device, mask = scores.device, rollout.response_mask
    groups: list[tuple[Tensor, HeadOptions | None]] = [*record.groups()]
    if record.is_filled:
        again = model.value_head is not None or reference is not None
        groups = [(torch.arange(len(rollout), device=device), None)] if again else []
    padding = [mask.new_zeros(0)]
    for some, asked in groups:
        (passes,) = passes_of(rollout[some], limit, packed=model.packs)
        if is_sharded(model):  # ranks need each other's weights equally often
            passes += [[]] * (highest(len(passes), device) - len(passes))
        for numbers, micro in passes_over(rollout, passes, some):
            padding.append(micro.padding(packed=model.packs).flatten())
            outputs, values, seen = None, None, None
            if asked is None:
                values = model.values(micro)
            else:
                outputs, values = model.outputs(micro, asked)
            if reference is not None:
                seen = reference.outputs(micro, record.of_reference, device)
            if not len(numbers):
                continue
            row, column = micro.response_mask.nonzero(as_tuple=True)
            rows = numbers[row]
            if outputs is not None:
                record.add(outputs, seen, rows, column)
            if values is not None:
                record.keep("values", values[micro.response_mask], rows, column)
            if seen is not None:
                record.keep("ref_logprobs", seen.logprobs, rows, column)
    columns = record.columns(mask)
    observed = {
        name.removeprefix("observed/"): column
        for name, column in columns.items()
        if name.startswith("observed/")
    }
    experience = build_experience(
        rollout,
        scores,
        columns["old_logprobs"],
        columns.get("ref_logprobs"),
        columns.get("values"),
        observed,
    )
    none = torch.zeros(*mask.shape, len(EntropyStats._fields), device=device)
    return EvaluatedRollout(
        experience,
        EntropyStats(*columns.get("entropies", none).unbind(-1)),
        mask & record.looked_at.unsqueeze(1),
        record.scales(),
        torch.cat(padding),
    )
