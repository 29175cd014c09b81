"""Positive-advantage reweighting: less weight for what makes the entropy collapse."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.common.validation import at_least, positive, unit_fraction
from tre_lightning.methods.controller import EntropyController
from tre_lightning.methods.hooks import LinearSchedule, ends_of, value_at


class PositiveAdvantageReweighting(EntropyController):
    """Weight lambda in the policy loss for tokens of positive advantage, 1 for the others.

    Source: "Revisiting Entropy in Reinforcement Learning for Large Reasoning Models", Jin et al.
    2025, arXiv 2511.05993: tokens of positive advantage are what lowers the entropy, so the loss on
    them is multiplied by lambda in [0, 1]. Its entropy-guided form, the default here, moves lambda
    after each step towards what the entropy H needs:

        lambda <- lambda - step if H < target, lambda + step if H > target, held in [0, 1]

    The paper's other two give lambda by time: 0 for the first half of the training and then
    linearly to 1, or (e - 1) / (E - 1) in epoch e of E. With ``target`` none ``weight`` is a
    constant or a schedule over PPO iterations, of which the second is one; the first is not.

    Only the abstract and a summary of the paper could be read, and the authors' code
    (cordercorder/EntropyRL) could not be had. From the summary: the formulas, and ``step`` 0.05.
    Not recovered, and our choice: lambda at the start (1, plain PPO) and ``target`` (0.2 nats;
    the summary has 0.187 as the entropy that their run ends at).

    Deviations: H is that of the policy that sampled, over the global rollout.
    """

    def __init__(
        self,
        weight: float | LinearSchedule = 1.0,
        target: float | None = 0.2,
        step: float = 0.05,
        name: str = "positive_advantage",
    ) -> None:
        """Set the weight and how it follows the entropy.

        Args:
            weight: lambda, from 0 to 1: that of the first iteration, or, with ``target`` none, a
                constant or a schedule over iterations; 1 with ``target`` none = off.
            target: entropy to hold, > 0 nats; none = the weight does not follow the entropy.
            step: change of the weight an iteration, >= 0.
            name: name in the logs.
        """
        super().__init__(name)
        for end in ends_of(weight):
            unit_fraction(f"{self.where}.weight", end)
        at_least(f"{self.where}.step", step, 0.0)
        if target is not None:
            positive(f"{self.where}.target", target)
            if isinstance(weight, LinearSchedule):
                raise ValueError(
                    f"{self.where}.target={target} moves the weight, and so does its schedule; "
                    "give target: null or one number as the weight"
                )
        self.weight = weight
        self.target = target
        self.step = step
        self.following = ends_of(weight)[0]  # of the next iteration, where it follows the entropy
        self.used = self.following

    def adapt(self, batch: TrainingBatch) -> None:
        """Take this iteration's weight, and adjust that of the next."""
        self.used = self.following if self.target else value_at(self.weight, self.iteration)
        super().adapt(batch)

    def follow(self, entropy: float) -> None:
        """Lower the next weight below the target entropy, raise it above."""
        if self.target is not None:
            moved = self.following + self.step * ((entropy > self.target) - (entropy < self.target))
            self.following = min(max(moved, 0.0), 1.0)

    def policy_weights(self, minibatch: TrainingBatch, key: tuple[int | str, ...]) -> Tensor | None:
        """Lambda at positive advantages, else 1, ``[B, T]``; None where it is off."""
        if self.weight == 1.0 and self.target is None:
            return None
        ones = torch.ones_like(minibatch.advantages)
        return ones.masked_fill_(minibatch.advantages > 0.0, self.used)

    def logged(self) -> Mapping[str, float]:
        """The weight, and the mean entropy, nats."""
        return {} if self.entropy is None else {"weight": self.used, "entropy": self.entropy}

    def state_dict(self) -> dict[str, Any]:
        """State to save: the weight of the next iteration."""
        return {"weight": self.following}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the weight."""
        self.following = state_dict["weight"]
