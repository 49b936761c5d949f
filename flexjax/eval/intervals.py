"""Intervals of counted things: between which rates lies the one that a sample was drawn from."""

import math
import statistics


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Returns the bounds of Wilson's score interval (Wilson 1927) of a rate, both in 0..1.

    It keeps its level near 0 and 1 and for few trials, where the usual "rate plus or minus two errors" does not. Without
    trials nothing is known: (0, 1).

    Raises:
      ValueError: there are more successes than trials, or fewer than none.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if not trials:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    rate, weight = successes / trials, 1 + z * z / trials
    center = (rate + z * z / (2 * trials)) / weight
    half = z / weight * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else center - half  # exactly, so that nothing beats a chance of 0 by rounding
    high = 1.0 if successes == trials else center + half
    return low, high
