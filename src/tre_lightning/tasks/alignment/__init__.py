"""Alignment: prompts, preference pairs, and scores of a reward model."""
