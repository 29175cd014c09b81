"""Limits of size, so that a hostile answer costs little."""

MAX_CHARS = 1000  # of an answer; the longest gold of MATH has 159
MAX_DEPTH = 12  # of brackets in brackets
MAX_EXPONENT = 10_000  # of a number in an exponent
MAX_FACTORIAL = 200  # of a number under a factorial or in a binomial
MAX_BITS = 50_000  # of an exact power; larger ones are computed to some digits
MAX_MAGNITUDE = 10**6  # natural logarithm of the largest value that is computed
