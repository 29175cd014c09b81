"""Log-probabilities and entropies at the speed of memory."""
