"""Hashes and moments, in Python integers and fractions."""

import fractions


def splitmix64(x):
    """One draw of the generator whose state was x, with Python integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def moments(x):
    """Mean and variance (over n) of numbers, exact."""
    x = [fractions.Fraction(v) for v in x]
    mean = sum(x) / len(x)
    return mean, sum((v - mean) ** 2 for v in x) / len(x)
