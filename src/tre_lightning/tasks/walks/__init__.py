"""Number walks: prompts of a chosen length and their scorer."""
