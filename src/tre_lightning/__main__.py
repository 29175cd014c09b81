"""``python -m tre_lightning``: the same as the console script ``tre-lightning``."""

from tre_lightning.cli.main import run

if __name__ == "__main__":
    run()
