"""The colours of every figure and report.

One sequential colour map (cividis), whose lightness rises evenly, so that it reads in greyscale and with every kind of
colour vision. Three categorical colours, which are always drawn with a marker of their own.
"""

from __future__ import annotations

SEQUENTIAL = "cividis"  # a colour map of matplotlib
CATEGORICAL = ("#0072b2", "#d55e00", "#009e73")  # of Okabe and Ito
MARKERS = ("o", "s", "^")  # one per categorical colour
# The parts of the map that stand out by 3:1 from white paper and from the dark page of a report.
_LIGHT_RANGE, _DARK_RANGE = (0.0, 0.6), (1.0, 0.42)


def sequential(u: float) -> str:
    """Return the colour at u in [0, 1] as #rrggbb."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[SEQUENTIAL](float(u)))


def cluster_colours(k: int, *, dark: bool = False) -> list[str]:
    """Return the colours of k clusters in the order of the noise; the cluster of least noise stands out most.

    Args:
        dark: for a dark page; by default for white paper.
    """
    first, last = _DARK_RANGE if dark else _LIGHT_RANGE
    return [sequential(first + (last - first) * i / max(1, k - 1)) for i in range(k)]
