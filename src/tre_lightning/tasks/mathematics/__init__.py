"""Mathematics: prompts, the MATH scorer and its worker processes."""
