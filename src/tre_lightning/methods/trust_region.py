"""Trust Region Entropy, the method that this project is about (arXiv 2602.03635)."""

from torch import Tensor

from tre_lightning.entropy import check_region
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, PolicyOutputs, Tokens
from tre_lightning.ops.region import Region


class TrustRegionEntropy(LossTerm):
    """TRE: raise the rescaled entropy inside the trust region only (arXiv 2602.03635)."""

    def __init__(
        self,
        coef: float | LinearSchedule = 0.001,
        top_k: int | None = None,
        top_p: float | None = None,
        rescale: bool = True,
        name: str = "tre",
    ) -> None:
        """Exactly one of ``top_k`` and ``top_p`` names the region.

        Args:
            coef: coefficient of the entropy, >= 0 (paper: 0.001), or a schedule over iterations.
            top_k: the region is this many most probable tokens (paper: 2).
            top_p: the region is the smallest nucleus of this mass (paper: 0.99).
            rescale: multiply the entropy by log|V| / log|A|.
            name: name in the logs.
        """
        super().__init__(name, coef)
        check_region(top_k, top_p)
        self.region = Region(top_k, top_p)
        self.regions = (self.region,)
        self.rescale = rescale

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Minus the (rescaled) entropy inside the region, ``[n]``."""
        stats = outputs.entropy(self.region)
        return -(stats.scaled if self.rescale else stats.region)

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        """log|V| / log|A|, 0 where the region is one token, ``[n]``."""
        if not self.rescale:
            return super().scale(outputs)
        return outputs.entropy(self.region).scale
