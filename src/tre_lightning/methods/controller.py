"""What the methods share that follow the entropy of each rollout."""

from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.entropy import Region
from tre_lightning.methods.hooks import Method
from tre_lightning.ops import PolicyOutputs


class EntropyController(Method):
    """A method that acts by the mean entropy of the rollout, over the whole vocabulary.

    The entropy is the exact one of the policy that sampled, over the global rollout; a rollout
    without a counted token changes nothing.

    Attributes:
        entropy: that mean, nats; None before the first rollout.
    """

    observed_regions = (Region(),)
    entropy: float | None = None

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        """Entropy over the whole vocabulary, ``[n]`` nats."""
        return outputs.entropy(Region()).full

    def adapt(self, batch: TrainingBatch) -> None:
        """Measure the mean entropy and follow it."""
        entropies = batch.observed[self.name][batch.response_mask]
        if len(entropies):
            self.entropy = entropies.double().mean().item()
            self.follow(self.entropy)

    def follow(self, entropy: float) -> None:
        """Adjust the method's own state to the mean entropy, nats."""
