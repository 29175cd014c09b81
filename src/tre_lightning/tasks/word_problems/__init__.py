"""Word problems: arithmetic asked in English, for small pretrained models."""
