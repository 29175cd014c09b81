"""Alignment: prompts, pairs of responses, and scores of a reward model."""
