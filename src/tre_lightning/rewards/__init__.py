"""Rule-based scores: pure functions from a response text to a number, no torch."""

from tre_lightning.rewards.countdown import score_countdown

__all__ = ["score_countdown"]
