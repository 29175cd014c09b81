"""Countdown: prompts, puzzles and the scorer."""
