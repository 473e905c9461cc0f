"""Turns and ratios: both sides one after the other, again and again, so that a noisy machine is noisy to both.

A figure is {"median", "low", "high"} of the turns. A ratio is taken turn by turn, of neighbours in time, and then its median.
"""
import math
import statistics


def figure(values):
    """Median and spread of what the turns gave; None where none of them gave anything."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(ours, theirs, lower_is_better=True):
    """How many times better ours are, as a figure. `ours` and `theirs` are values of the same turns, in order.

    For seconds that is theirs / ours, for rates ours / theirs. A peer with fewer turns (it was too slow for more) is
    compared by its median with each of ours.
    """
    if not ours or not theirs:
        return None
    if len(theirs) != len(ours):
        theirs = [statistics.median(theirs)] * len(ours)
    pairs = zip(theirs, ours) if lower_is_better else zip(ours, theirs)
    return figure([above / below if below > 0 else math.inf for above, below in pairs])


def in_turns(sides, turns):
    """{name: [result of each turn]} of the functions in `sides`. A side that raises Gone is not asked again."""
    results = {name: [] for name in sides}
    gone = set()
    for _ in range(turns):
        for name, side in sides.items():
            if name in gone:
                continue
            try:
                results[name].append(side())
            except Gone:
                gone.add(name)
    return results


class Gone(Exception):
    """A side that cannot go on: over its time limit, or out of memory. The text says which."""


def relative_off(a, b):
    """|a - b| / |b|, infinite where either is not finite, or b is 0."""
    return abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) and b else math.inf


def worst_off(ours, theirs):
    """The largest relative distance of the losses of the steps that both did; infinite where there is none."""
    return max((relative_off(a, b) for a, b in zip(ours, theirs)), default=math.inf)
