"""The colours of every figure and report.

There is one sequential colour map, cividis. Its lightness rises evenly, so that figures remain readable in greyscale
and with every kind of colour vision. The three categorical colours are always drawn with one marker each.
"""

from __future__ import annotations

SEQUENTIAL = "cividis"  # name of a matplotlib colour map
CATEGORICAL = ("#0072b2", "#d55e00", "#009e73")  # from the palette of Okabe and Ito
MARKERS = ("o", "s", "^")  # one per categorical colour
# Lengths of dashes and gaps, in points. Clusters take them in turn, so that their lines differ in more than lightness.
DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (2, 2.5), (9, 3, 2, 3), (4.5, 2))
# The parts of the map with a contrast of at least 3:1 against white paper and against the dark page of a report.
_LIGHT_RANGE, _DARK_RANGE = (0.0, 0.6), (1.0, 0.42)


def sequential(u: float) -> str:
    """Return the colour at u in [0, 1] as #rrggbb."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[SEQUENTIAL](float(u)))


def cluster_colours(k: int, *, dark: bool = False) -> list[str]:
    """Return the colours of k clusters, in order of increasing noise. The cluster of least noise has the most contrast.

    Args:
        dark: whether the page is dark; by default it is white paper.
    """
    first, last = _DARK_RANGE if dark else _LIGHT_RANGE
    return [sequential(first + (last - first) * i / max(1, k - 1)) for i in range(k)]
