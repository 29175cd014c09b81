"""How much memory this process has held."""

import resource
import sys


def peak_memory() -> int:
    """The most memory that the process has held at a time so far, bytes, libraries included."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
