"""Callbacks of a run: checkpoints, progress, the closing summary and predictions."""
