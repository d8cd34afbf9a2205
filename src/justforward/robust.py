"""What one client can do to a step is bounded: rises far from those of the others are drawn in.

Of each direction's rises r, one a row: with m their median and s = 1.4826 median |r - m| (which is the standard deviation
where they are Gaussian), a rise counts as the nearest number in [m - k s, m + k s]. In activation space every row has a
direction of its own, along which it is as likely to rise as to fall: there m is 0 and all rises of the step are taken together.

This is the median absolute deviation as in Huber, Robust Statistics (1981), section 5.1. Half of the rows being honest, no others
move the mean by more than their share of k s (and what they move m and s by). It changes nothing of rows without outliers,
and takes from honest rows beyond k s what lies beyond: a bias towards the median. It cannot help against half of the rows, nor
against rises that are wrong within the bound.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from justforward.sights import Sight

LEAST = 4  # of fewer rows no one can say which is the outlier
_SIGMA = 1.4826


def bounds(rises: Sequence[float], k: float, symmetric: bool) -> tuple[float, float]:
    """Between what rises may be.

    Args:
        rises: of all rows, finite.
        k: how many deviations.
        symmetric: about 0 (activation space), not about their median.
    """
    middle = 0.0 if symmetric else statistics.median(rises)
    reach = k * _SIGMA * statistics.median(abs(rise - middle) for rise in rises)
    return middle - reach, middle + reach


def drawn_in(
    sights: Sequence[tuple[int, Sight]], k: float, apart: bool
) -> tuple[list[Sight], Counter[int]]:
    """The sights with their outliers drawn in, and how many of each owner's rises were.

    Args:
        sights: with who sent each; all of the same samples of one step.
        k: how many deviations from the middle are let be.
        apart: whether each row has directions of its own.

    Returns:
        Sights in the same order, and counts.
    """
    if not sights or sum(len(sight.rows) for _, sight in sights) < LEAST:
        return [sight for _, sight in sights], Counter()
    count = len(sights[0][1].rises)
    if apart:
        together = [x for _, sight in sights for own in sight.rises for x in own]
        limits = [bounds(together, k, symmetric=True)] * count
    else:
        by_sample = [[x for _, s in sights for x in s.rises[i]] for i in range(count)]
        limits = [bounds(rises, k, symmetric=False) for rises in by_sample]
    out: list[Sight] = []
    counts: Counter[int] = Counter()
    for owner, sight in sights:
        kept: list[tuple[float, ...]] = []
        for own, (low, high) in zip(sight.rises, limits, strict=True):
            # in float64: bounds may be beyond float32, what is drawn in is not beyond what it was
            kept.append(tuple(np.clip(np.array(own), low, high).astype(np.float32).tolist()))
            counts[owner] += sum(not low <= x <= high for x in own)
        out.append(replace(sight, rises=tuple(kept)))
    return out, +counts
