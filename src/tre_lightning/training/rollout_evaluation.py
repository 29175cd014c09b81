"""What the models say of a rollout before the update: the arrow from a rollout to an experience."""

from collections.abc import Mapping, Sequence
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
from tre_lightning.training.losses import spread
from tre_lightning.training.objective import asked_by
from tre_lightning.training.reference import Reference
from tre_lightning.training.targets import build_experience


class EvaluatedRollout(NamedTuple):
    """A rollout under the policy that sampled it."""

    experience: Experience
    entropies: EntropyStats  # [B, T] each, of the region of the diagnostics
    scales: Mapping[str, float]  # mean of each loss term's ``scale`` over all ranks, by its name


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
    micro_batch_size: int,
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
        micro_batch_size: rows of one pass.
    """
    observed = [each for method in methods for each in method.observed_regions]
    asked = asked_by(methods, options, region, *observed)
    # Of the reference, only what is asked for: mostly log-probabilities alone.
    of_reference = asked_by([m for m in methods if m.needs_reference], options)
    scales = {term.name: MaskedMean().to(scores.device) for term in loss_terms(methods)}
    pieces: dict[str, list[Tensor]] = {}
    starts = range(0, len(rollout), micro_batch_size)
    micros = [rollout[start : start + micro_batch_size] for start in starts]
    idle = 0
    if is_sharded(model):  # ranks need each other's weights equally often
        idle = highest(len(micros), scores.device) - len(micros)
    for number, micro in enumerate([*micros, *[rollout[:1]] * idle]):
        outputs, values = model.outputs(micro, asked)
        seen = None
        if reference is not None:
            seen = reference.outputs(micro, of_reference, scores.device)
        if number >= len(micros):
            continue
        stats = torch.stack(list(outputs.entropy(region)), dim=-1)  # sizes as floats
        piece = {"old_logprobs": outputs.logprobs, "entropies": stats}
        if values is not None:
            piece["values"] = values
        if seen is not None:
            piece["ref_logprobs"] = seen.logprobs
        for method in methods:
            kept = method.observe(outputs, seen)
            if kept is not None:
                piece[f"observed/{method.name}"] = kept
        for name, part in piece.items():
            rows = part if name == "values" else spread(part, micro.response_mask)
            pieces.setdefault(name, []).append(rows)
        for term in loss_terms(methods):
            scales[term.name].update(term.scale(outputs))
    columns = {name: torch.cat(parts) for name, parts in pieces.items()}
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
    )
