"""What all rooms may use: errors, ranks, seeds, validation, metrics; imports nothing of ours."""
