"""TensorBoard histograms of region sizes and of entropy by position."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import Metric

from tre_lightning.entropy import EntropyStats

BINS = 30  # as many as TensorBoard draws: a bin's height is then drawn as it is
_EMPTY = 1e-9  # TensorBoard would cut off bins of 0 at the ends and widen the last one instead


class EntropyHistograms(Metric):
    """Distribution of the region sizes, and mean entropies by position in the response.

    Sums over all updates and devices; each value is a histogram of ``BINS`` equal bins.
    """

    is_differentiable = False
    full_state_update = False

    sizes: Tensor
    tokens: Tensor
    full: Tensor
    region: Tensor

    def __init__(self, vocab_size: int, max_new_tokens: int) -> None:
        """Set the ends of the axes.

        Args:
            vocab_size: V, the largest region.
            max_new_tokens: longest response.
        """
        super().__init__()
        self.width = math.log2(max(vocab_size, 2))
        self.max_new_tokens = max_new_tokens
        for name, length in (
            ("sizes", BINS),
            ("tokens", max_new_tokens),
            ("full", max_new_tokens),
            ("region", max_new_tokens),
        ):
            zeros = torch.zeros(length, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, stats: EntropyStats, mask: Tensor) -> None:
        """Count the tokens where ``mask`` is True, ``[B, T]`` each, T at most the longest."""
        bins = stats.size[mask].double().log2().mul(BINS / self.width).long().clamp(0, BINS - 1)
        self.sizes += bins.bincount(minlength=BINS)
        length = mask.shape[1]
        self.tokens[:length] += mask.sum(0)
        self.full[:length] += stats.full.double().where(mask, 0.0).sum(0)
        self.region[:length] += stats.region.double().where(mask, 0.0).sum(0)

    def compute(self) -> dict[str, tuple[Tensor, float]]:
        """Heights ``[BINS]`` (float64) and right end of the axis, which starts at 0, by tag."""
        end = float(self.max_new_tokens)
        return {
            "entropy/region_size_histogram": (self.sizes, self.width),
            "entropy/full_by_position": (self._by_position(self.full), end),
            "entropy/region_by_position": (self._by_position(self.region), end),
        }

    def _by_position(self, total: Tensor) -> Tensor:
        """Mean in each bin; fewer positions than bins stand in several of them."""
        edges = [i * self.max_new_tokens // BINS for i in range(BINS + 1)]
        means = []
        for first, end in pairwise(edges):
            places = slice(first, max(end, first + 1))
            means.append(total[places].sum() / self.tokens[places].sum())
        return torch.stack(means).nan_to_num(0.0)  # no response was so long


def add_histogram(writer: SummaryWriter, tag: str, heights: Tensor, end: float, step: int) -> None:
    """Write equal bins over 0 to ``end`` of these heights."""
    counts = heights.double().cpu().clamp(min=_EMPTY)
    edges = torch.linspace(0.0, end, len(counts) + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        tag,
        min=0.0,
        max=end,
        num=float(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles.square()).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
