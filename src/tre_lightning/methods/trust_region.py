"""Trust Region Entropy (TRE), the method that this project is about (arXiv 2602.03635).

Ours beyond the paper, off by default: the region may be that of the policy that sampled or of the
initial policy instead of the current one's (``region_of``), its size and the coefficient may follow
a schedule, it may be that of min-p sampling (``min_p``, TRE-min-p), and a nucleus or min-p region
may be kept from shrinking below some tokens (``min_size``).
"""

from dataclasses import asdict
from typing import Literal, get_args

import torch
from torch import Tensor

from tre_lightning.common.validation import at_least, one_of
from tre_lightning.entropy import Region, check_region, entropy_of_tokens, trust_region_mask
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, Tokens, ends_of, value_at
from tre_lightning.ops import PolicyOutputs

Owner = Literal["current", "behaviour", "reference"]


class TrustRegionEntropy(LossTerm):
    """TRE: raise the rescaled entropy inside the trust region only (arXiv 2602.03635)."""

    def __init__(
        self,
        coef: float | LinearSchedule = 0.001,
        top_k: int | LinearSchedule | None = None,
        top_p: float | LinearSchedule | None = None,
        min_p: float | LinearSchedule | None = None,
        rescale: bool = True,
        region_of: Owner = "current",
        max_size: int = 64,
        min_size: int = 1,
        name: str = "tre",
    ) -> None:
        """Exactly one of ``top_k``, ``top_p`` and ``min_p`` names the region.

        Args:
            coef: coefficient of the entropy, >= 0 (paper: 0.001), or a schedule over iterations.
            top_k: the region is this many most probable tokens (paper: 2), or a schedule, rounded.
            top_p: the region is the smallest nucleus of this mass (paper: 0.99), or a schedule.
            min_p: the region is the tokens at least this many times as probable as the most
                probable one, in (0, 1) (min-p sampling: 0.05 to 0.1), or a schedule.
            rescale: multiply the entropy by log|V| / log|A|.
            region_of: the policy that defines the region: the ``current`` one (the paper), the
                ``behaviour`` policy that sampled, or the ``reference``, the initial policy. The
                latter two need the logits in every update, and the reference a second model.
            max_size: most tokens kept of a region that is not the current policy's.
            min_size: least tokens of a nucleus or min-p region; a smaller one is replaced by the
                top ``min_size``, so that positions where the policy is sure count too.
            name: name in the logs.
        """
        super().__init__(name, coef)
        one_of(f"{self.where}.region_of", region_of, get_args(Owner))
        at_least(f"{self.where}.max_size", max_size, 1)
        at_least(f"{self.where}.min_size", min_size, 1)
        sizes = (_ends(size) for size in (top_k, top_p, min_p))
        for tokens, mass, least in zip(*sizes, strict=True):
            check_region(_tokens(tokens), mass, least, owner=self.where)
        if min_size > 1 and (top_k is not None or region_of != "current"):
            raise ValueError(
                f"{self.where}.min_size={min_size} is for a nucleus or min-p region of the current "
                "policy; give top_p or min_p and region_of: current, or leave it at 1"
            )
        self.top_k, self.top_p, self.min_p = top_k, top_p, min_p
        self.rescale = rescale
        self.region_of = region_of
        self.max_size = max_size
        self.min_size = min_size
        self.needs_logits = region_of != "current"
        self.needs_reference = region_of == "reference"

    @property
    def region(self) -> Region:
        """The region of this iteration."""
        sizes = (self.top_k, self.top_p, self.min_p)
        now = [None if size is None else value_at(size, self.iteration) for size in sizes]
        return Region(_tokens(now[0]), now[1], now[2])

    @property
    def regions(self) -> tuple[Region, ...]:  # type: ignore[override]
        """The region, and the top-k region that replaces one below ``min_size``."""
        if self.region_of != "current":
            return ()
        return (self.region,) if self.min_size == 1 else (self.region, Region(top_k=self.min_size))

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor | None:
        """Token ids of the region, most probable first, padded with -1, ``[n, C]``."""
        if self.region_of == "current":
            return None
        seen = reference if self.region_of == "reference" else outputs
        assert seen is not None and seen.logits is not None
        region = self.region
        mask = trust_region_mask(seen.logits, **asdict(region))
        kept = seen.logits.float().masked_fill(~mask, -torch.inf)
        width = min(self.max_size, kept.shape[-1])
        if region.top_k is not None:
            width = min(width, region.top_k)
        best = kept.topk(width)
        return best.indices.masked_fill(best.values == -torch.inf, -1)

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Minus the (rescaled) entropy inside the region, ``[n]``."""
        if self.region_of != "current":
            assert outputs.logits is not None
            entropy, scale = entropy_of_tokens(outputs.logits, tokens.observed[self.name])
            return -(entropy * scale if self.rescale else entropy)
        return -self._current(outputs, "scaled" if self.rescale else "region")

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """log|V| / log|A|, 0 where the region is one token, ``[n]``.

        1 for a region that is not the current policy's: it is not known from its outputs.
        """
        if not self.rescale or self.region_of != "current":
            return super().scale(outputs)
        return self._current(outputs, "scale")

    def _current(self, outputs: PolicyOutputs, field: str) -> Tensor:
        region, *floor = self.regions
        stats = outputs.entropy(region)
        value: Tensor = getattr(stats, field)
        for least in floor:
            small = stats.size < self.min_size
            value = torch.where(small, getattr(outputs.entropy(least), field), value)
        return value


def _tokens(value: float | None) -> int | None:
    return None if value is None else round(value)


def _ends(value: float | LinearSchedule | None) -> tuple[float | None, float | None]:
    return (None, None) if value is None else ends_of(value)
