"""Helpers for all packages: errors, ranks, seeds, validation, metrics; imports none of them."""
