"""The policy and its critic: models, head, adapters, sharding, tokens; it knows no PPO."""
