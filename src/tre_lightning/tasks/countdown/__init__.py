"""Countdown: puzzles and the score of a response."""
