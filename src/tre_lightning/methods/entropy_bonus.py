"""The standard entropy bonus, the baseline that TRE improves on."""

from torch import Tensor

from tre_lightning.entropy import Region
from tre_lightning.methods.hooks import LinearSchedule, LossTerm, Tokens
from tre_lightning.ops import PolicyOutputs


class EntropyBonus(LossTerm):
    """The standard entropy bonus, over the whole vocabulary (Williams and Peng 1991)."""

    regions = (Region(),)

    def __init__(self, coef: float | LinearSchedule = 0.001, name: str = "entropy") -> None:
        """Set the coefficient.

        Args:
            coef: coefficient of the entropy, >= 0, or a schedule over iterations.
            name: name in the logs.
        """
        super().__init__(name, coef)

    def per_token(self, outputs: PolicyOutputs, tokens: Tokens) -> Tensor:
        """Minus the entropy over the whole vocabulary, ``[n]``."""
        return -outputs.entropy(Region()).region
