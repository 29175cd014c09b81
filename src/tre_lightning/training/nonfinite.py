"""Detection of losses and gradients that are not finite, on all ranks alike."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tre_lightning.common.distributed import gather_rows
from tre_lightning.common.errors import RunError

_GROUPS = ("policy", "critic")  # order of the gradient norms


class NonFiniteError(RunError):
    """Too many updates in a row were not finite; raised on all ranks alike."""

    of_all_ranks = True


def nan_gradient_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss ``[]``, with a gradient of NaN if the loss is not finite.

    Ranks exchange gradients, so their norms then tell every rank of a loss on one of them.
    """
    return loss * torch.where(loss.isfinite(), 1.0, math.nan)


def all_finite(norms: Sequence[Tensor]) -> bool:
    """Whether all gradient norms ``[]`` are finite."""
    return bool(torch.stack([norm.detach().float() for norm in norms]).isfinite().all())


def end_of_run(losses: Mapping[str, Tensor], norms: Sequence[Tensor], in_a_row: int) -> RunError:
    """The error that ends the run. Collective: call on all ranks.

    Args:
        losses: this rank's parts ``[]`` of the losses of the update, by their names in the logs.
        norms: gradient norms ``[]`` of the policy and, if there is one, the critic.
        in_a_row: skipped updates.
    """
    parts = gather_rows(torch.stack([part.float() for part in losses.values()]).unsqueeze(0), 0)
    terms = dict(zip(losses, parts.isfinite().all(0).tolist(), strict=True))
    groups = dict(zip(_GROUPS, (all_finite([norm]) for norm in norms), strict=False))
    bad = [f"loss/{name}" for name, finite in terms.items() if not finite and name != "total"]
    bad = bad or [f"gradient of the {name}" for name, finite in groups.items() if not finite]
    return NonFiniteError(
        f"{in_a_row} updates in a row were skipped (model.ppo.max_skipped_updates): not finite: "
        f"{', '.join(bad)}; lower model.optim.lr or the coefficient of that loss term, give "
        "trainer.precision 32-true or bf16-mixed, and look at the curves of the last iterations"
    )
