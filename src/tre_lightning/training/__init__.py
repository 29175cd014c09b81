"""Training: PPO with its targets, losses and diagnostics; SFT and reward models."""
