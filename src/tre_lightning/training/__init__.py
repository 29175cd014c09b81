"""PPO and what it trains by: targets, losses, diagnostics; supervised training too."""
