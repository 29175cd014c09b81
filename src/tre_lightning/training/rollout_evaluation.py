"""What the models say of a rollout before the update: the arrow from a rollout to an experience."""

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
from tre_lightning.ops import Region
from tre_lightning.policy.actor_critic import ActorCritic
from tre_lightning.policy.head import HeadOptions
from tre_lightning.policy.sharding import is_sharded
from tre_lightning.training.micro_batches import PassLimit, passes_of
from tre_lightning.training.objective import asked_by
from tre_lightning.training.reference import Reference
from tre_lightning.training.targets import build_experience


class EvaluatedRollout(NamedTuple):
    """A rollout under the policy that sampled it."""

    experience: Experience
    entropies: EntropyStats  # [B, T] each, of the region of the diagnostics
    scales: Mapping[str, float]  # mean of each loss term's ``scale`` over all ranks, by its name
    padding: Tensor  # [columns of all passes together] bool, True = computed for nothing


class _Collected:
    """Numbers of a rollout's tokens, by name, that come in parts of some rows."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, name: str, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """``values`` ``[n, ...]`` of the tokens at these places, ``[n]`` each."""
        self._parts.setdefault(name, []).append((rows, columns, values))

    def of(self, mask: Tensor) -> dict[str, Tensor]:
        """All values in their places, ``[B, T, ...]``, 0 where there is none."""
        found = {}
        for name, parts in self._parts.items():
            rows, columns, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            found[name] = values.new_zeros(mask.shape + values.shape[1:])
            found[name][rows, columns] = values
        return found


@torch.no_grad()
def evaluate_rollout(
    rollout: Rollout,
    scores: Tensor,
    methods: Sequence[Method],
    *,
    model: ActorCritic,
    reference: Reference | None,
    options: HeadOptions,
    region: Region,
    limit: PassLimit,
) -> EvaluatedRollout:
    """Log-probabilities, values and entropies of this rank's responses, and what methods observe.

    Args:
        rollout: B responses.
        scores: ``[B]``; NaN = could not be scored.
        methods: those of the run.
        model: the policy that sampled, and its critic.
        reference: the initial policy, where it is wanted.
        options: what is asked of the head but for regions and logits.
        region: that of the diagnostics.
        limit: of one pass.
    """
    device = scores.device
    observed = [each for method in methods for each in method.observed_regions]
    asked = asked_by(methods, options, region, *observed)
    # Of the reference, only what is asked for: mostly log-probabilities alone.
    of_reference = asked_by([m for m in methods if m.needs_reference], options)
    scales = {term.name: MaskedMean().to(device) for term in loss_terms(methods)}
    collected, padding = _Collected(), []
    (passes,) = passes_of(rollout, limit, packed=model.packs)
    idle = 0
    if is_sharded(model):  # ranks need each other's weights equally often
        idle = highest(len(passes), device) - len(passes)
    for rows in [torch.tensor(rows, device=device) for rows in [*passes, *[[]] * idle]]:
        micro = (rollout[rows] if len(rows) else rollout[:1].uncounted()).trimmed()
        padding.append(micro.padding(packed=model.packs).flatten())
        outputs, values = model.outputs(micro, asked)
        seen = None if reference is None else reference.outputs(micro, of_reference, device)
        if not len(rows):
            continue
        mask = micro.response_mask
        row, column = mask.nonzero(as_tuple=True)
        add = partial(collected.add, rows=rows[row], columns=column)
        add("old_logprobs", values=outputs.logprobs)
        # Sizes as floats.
        add("entropies", values=torch.stack(list(outputs.entropy(region)), dim=-1))
        if values is not None:
            add("values", values=values[mask])
        if seen is not None:
            add("ref_logprobs", values=seen.logprobs)
        for method in methods:
            kept = method.observe(outputs, seen)
            if kept is not None:
                add(f"observed/{method.name}", values=kept)
        for term in loss_terms(methods):
            scales[term.name].update(term.scale(outputs))
    columns = collected.of(rollout.response_mask)
    experience = build_experience(
        rollout,
        scores,
        columns["old_logprobs"],
        columns.get("ref_logprobs"),
        columns.get("values"),
        {
            name.removeprefix("observed/"): column
            for name, column in columns.items()
            if name.startswith("observed/")
        },
    )
    return EvaluatedRollout(
        experience,
        EntropyStats(*columns["entropies"].unbind(-1)),
        {name: float(scale.compute()) for name, scale in scales.items()},
        torch.cat(padding),
    )
