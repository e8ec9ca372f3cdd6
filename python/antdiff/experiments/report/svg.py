"""Charts as inline SVG. Their text stays text, their colours come from the style sheet of the page.

Every chart is drawn for a column of 380 CSS pixels, and is legible in greyscale and on a phone. Clusters differ in
three ways at once: in lightness (in the order of the noise), in dashes, and by a label at the end of each line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from antdiff.plotting.palette import DASHES, sequential

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 68, 26, 36  # margins around the axes
LABEL_GAP = 13  # minimum distance between the baselines of two labels
CHARACTER = 6.7  # slightly more than the mean character width in the 12-pixel type of the style sheet
MOST_POINTS = 240  # maximum points per line; more make the file larger, not the curve clearer


@dataclass(frozen=True)
class Line:
    """One curve: its label, x and y [N], its cluster (None if it belongs to none), and y before smoothing."""

    label: str
    x: np.ndarray
    y: np.ndarray
    cluster: int | None = None
    raw: np.ndarray | None = None


def number(value: float) -> str:
    """Format a value with three digits: 0.0123, 1.60, 245, 12k. A dash stands for a missing value."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1e4:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def short(value: float) -> str:
    """Format a round number without trailing zeros: 0.5, 1600, 20k."""
    return f"{value:g}" if abs(value) < 1e4 else number(value)


def with_spread(mean: float, sd: float) -> str:
    """Format a mean and its standard deviation with the same decimals; the mean alone if `sd` is 0."""
    text = number(mean)
    return f"{text} ± {sd:.{len(text.partition('.')[2])}f}" if sd else text


# ---- charts ------------------------------------------------------------------------------------------------------


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    log: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Draw curves over one x axis, each labelled at its end. Return an empty string if none has a finite point.

    Args:
        y_range: range of the y axis; None means that of the data, including zero on a linear axis.
    """
    shown = [line for line in lines if np.isfinite(line.y).any()]
    if not shown:
        return ""
    x = np.concatenate([line.x for line in shown])
    ys = np.concatenate([array for line in shown for array in (line.y, line.raw) if array is not None])
    ys = ys[np.isfinite(ys) & (ys > 0)] if log else ys[np.isfinite(ys)]
    low, high = y_range or ((ys.min(), ys.max()) if log else (min(0.0, ys.min()), max(ys.max(), 0.0)))
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, log=log)
    x_axis = Axis(float(x.min()), float(x.max()), LEFT, WIDTH - RIGHT, fit=True)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    for line in shown:
        style = f"c{line.cluster}" if line.cluster is not None else "plain"
        if line.raw is not None:
            parts.append(f'<path class="raw {style}" d="{_path(line.x, line.raw, x_axis, y_axis)}"/>')
    ends = []
    for line in shown:
        style = f"c{line.cluster}" if line.cluster is not None else "plain"
        last = np.flatnonzero(np.isfinite(line.y))[-1]
        end = x_axis(line.x[last]), y_axis(line.y[last])
        ends.append((end, line.label))
        parts.append(
            f'<g class="{style}"><title>{escape(line.label)}</title>'
            f'<path class="line" d="{_path(line.x, line.y, x_axis, y_axis)}"{_dash(line.cluster)}/>'
            f'<circle class="end" cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="2.4"/></g>'
        )
    parts.append(_end_labels(ends))
    return _svg(title, _described(shown), parts, HEIGHT)


def heat_map(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float],
    numbers: bool,
    row_height: float,
    x_axis: tuple[str, float, float] | None = None,
) -> str:
    """Draw a matrix as coloured cells, with its scale below. Negative cells are hatched unless numbers are shown.

    Args:
        matrix: [R, C]. NaN cells stay empty.
        x_axis: label, first value and last value of a continuous x axis, instead of `columns`.
    """
    R, C = matrix.shape
    left, top = 12 + CHARACTER * max(map(len, rows)), 8
    width, bottom = (WIDTH - left - 8) / C, top + R * row_height
    parts = []
    every = max(1, math.ceil(12 / row_height))  # label every n-th row, so that labels do not touch
    for r in range(R):
        y = top + r * row_height
        if r % every == 0:
            parts.append(_text(left - 6, y + row_height / 2 + 4, rows[r], "end"))
        for c in range(C):
            value = matrix[r, c]
            if math.isfinite(value):
                parts.append(_cell(value, left + c * width, y, width, row_height, limits, numbers))
    if x_axis is None:
        parts += [
            _text(left + (c + 0.5) * width, bottom + 15, columns[c], "middle")
            for c in range(C)
            if width >= CHARACTER * len(columns[c]) or c % math.ceil(60 / width) == 0
        ]
    else:
        label, first, last = x_axis
        parts += [_text(left, bottom + 15, short(first)), _text(WIDTH - 8, bottom + 15, short(last), "end")]
        parts.append(_text((left + WIDTH - 8) / 2, bottom + 15, label, "middle", "axis"))
    parts.append(_scale(limits, left, bottom + 30, WIDTH - 8 - left))
    finite = matrix[np.isfinite(matrix)]
    description = f"{R} by {C} values from {number(finite.min())} to {number(finite.max())}." if len(finite) else ""
    return _svg(title, description, parts, bottom + 56)


def dot_plot(
    rows: Sequence[tuple[str, float, float, int | None]], *, title: str, x_label: str, log: bool = True
) -> str:
    """Draw one labelled dot per row (label, value, spread, cluster), with its value and a bar of +- its spread."""
    left, row_height = 12 + CHARACTER * max(len(label) for label, *_ in rows), 26
    bottom = 8 + len(rows) * row_height
    values = np.array([value for _, value, *_ in rows])
    values = values[np.isfinite(values) & (values > 0)] if log else values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = (values.min() / 1.3, values.max() * 1.3) if log else (0.0, values.max())
    axis = Axis(low, high, left, WIDTH - 90, log=log)
    parts = [
        f'<line class="grid" x1="{axis(v):.1f}" x2="{axis(v):.1f}" y1="8" y2="{bottom}"/>'
        + _text(axis(v), bottom + 14, short(v), "middle")
        for v in axis.ticks(4)
    ]
    for place, (label, value, spread, cluster) in enumerate(rows):
        y = 8 + (place + 0.5) * row_height
        parts.append(_text(left - 8, y + 4, label, "end", "name"))
        if not math.isfinite(value) or (log and value <= 0):
            continue
        style = f"c{cluster}" if cluster is not None else "plain"
        ends = [axis(min(max(end, axis.low), axis.high)) for end in (value - spread, value + spread)]
        parts.append(
            f'<g class="{style}"><line class="spread" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{axis(value):.1f}" cy="{y}" r="4.5"/></g>'
        )
        parts.append(_text(WIDTH - 4, y + 4, with_spread(value, spread), "end", "name"))
    parts.append(_text((left + WIDTH - 90) / 2, bottom + 30, x_label, "middle", "axis"))
    description = "; ".join(f"{label}: {number(value)}" for label, value, *_ in rows)
    return _svg(title, description + ".", parts, bottom + 38)


def interval_bar(intervals: Sequence[tuple[int, int]], *, title: str) -> str:
    """Draw timesteps 0 to T as one bar divided into the clusters: the key to the colours and dashes of the curves."""
    T, left, right = intervals[-1][1], 10, 12
    parts, free = [], 0.0  # free: left edge of the room for the next number
    for i, (start, stop) in enumerate(intervals):
        a, b = (left + (WIDTH - left - right) * t / T for t in (start, stop))
        parts.append(
            f'<g class="c{i}"><title>cluster {i}: t {start}..{stop - 1}</title>'
            f'<rect class="block" x="{a + 0.5:.1f}" y="6" width="{max(0.8, b - a - 1):.1f}" height="14"/>'
            f'<line class="line" x1="{a + 2:.1f}" x2="{max(a + 3, b - 2):.1f}" y1="30" y2="30"{_dash(i)}/></g>'
        )
        half = CHARACTER * len(str(start)) / 2
        if a - half >= free and a < WIDTH - right - 40:
            parts.append(_text(a, 48, str(start), "middle", "name"))
            free = a + half + 4
    parts.append(_text(WIDTH - right, 48, str(T - 1), "middle", "name"))
    parts += [_text(left - 4, 64, "least noise"), _text(WIDTH - 4, 64, "most noise", "end")]
    parts.append(_text(WIDTH / 2, 64, "timestep t", "middle", "axis"))
    description = "; ".join(
        f"cluster {i}: timesteps {start} to {stop - 1}" for i, (start, stop) in enumerate(intervals)
    )
    return _svg(title, description + ".", parts, 70)


# ---- elements of charts ------------------------------------------------------------------------------------------


class Axis:
    """Maps values from low to high to positions from a to b. The range is extended to end on ticks, unless `fit`."""

    def __init__(self, low: float, high: float, a: float, b: float, *, log: bool = False, fit: bool = False) -> None:
        self.log, self.a, self.b = log, a, b
        low, high = float(low), float(high)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (0.5 if low else 0), high + 0.5)
        if not log and not fit:
            step = _step((high - low) / 4)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(max(value, 1e-300)) if self.log else value
        return self.a + (self.b - self.a) * (value - low) / (high - low)

    def ticks(self, n: int) -> list[float]:
        """Return about n round values within the axis."""
        if self.log and self.high / self.low > 1.5:  # on a shorter axis, use the round numbers of a linear one
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for mantissas in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
                found = [m * 10.0**d for d in decades for m in mantissas if self.low <= m * 10.0**d <= self.high]
                if len(found) >= min(n, 3):
                    break
            return found[:: math.ceil(len(found) / (n + 2))]
        step = _step((self.high - self.low) / n)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _step(length: float) -> float:
    """Return the smallest number of at least `length` that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(length))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= length * (1 - 1e-9))


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for v in y_axis.ticks(4):
        y = y_axis(v)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, short(v), "end"))
    for v in x_axis.ticks(4):
        parts.append(_text(x_axis(v), HEIGHT - BOTTOM + 15, short(v), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle", "axis"))
    parts.append(_text(4, 11, y_label, "start", "axis"))
    return "".join(parts)


def _path(x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> str:
    """Return line segments through the points, with gaps where y is not finite or, on a log axis, not positive."""
    x, y = thinned(x, y)
    out, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b) or (y_axis.log and b <= 0):
            pen = "M"
            continue
        out.append(f"{pen}{x_axis(a):.1f} {y_axis(b):.1f}")
        pen = "L"
    return "".join(out)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points, as means over neighbours that ignore NaN."""
    if len(x) <= most:
        return x, y
    parts = [part for part in np.array_split(np.arange(len(x)), most) if len(part)]
    means = [np.mean(y[part][np.isfinite(y[part])]) if np.isfinite(y[part]).any() else np.nan for part in parts]
    return np.array([x[part].mean() for part in parts]), np.array(means)


def _end_labels(ends: Sequence[tuple[tuple[float, float], str]]) -> str:
    """Draw labels at the ends of the lines, moved apart where they would touch. With many lines, label every n-th."""
    room = int((HEIGHT - BOTTOM - TOP + LABEL_GAP) / LABEL_GAP)
    ends = ends[:: math.ceil(len(ends) / room)]
    order = sorted(ends, key=lambda end: end[0][1])
    places = [end[0][1] + 4 for end in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    lowest = HEIGHT - BOTTOM + 4
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], lowest - (len(places) - 1 - i) * LABEL_GAP)
    parts = []
    for ((x, y), label), place in zip(order, places, strict=True):
        if abs(place - 4 - y) > 2:
            parts.append(f'<path class="leader" d="M{x + 3:.1f} {y:.1f}L{x + 8:.1f} {place - 4:.1f}"/>')
        parts.append(_text(x + 10, place, label, "start", "name"))
    return "".join(parts)


def _cell(
    value: float, x: float, y: float, width: float, height: float, limits: tuple[float, float], numbers: bool
) -> str:
    u = min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width + 0.3:.1f}" height="{height + 0.3:.1f}"'
    out = f'<rect {box} fill="{sequential(u)}"/>'
    ink = "on-dark" if u < 0.47 else "on-light"  # the better readable one of white and black
    if numbers:
        return out + _text(x + width / 2, y + height / 2 + 4, f"{value:.2f}", "middle", ink)
    return out + (f'<rect {box} fill="url(#negative-{ink})"/>' if value < 0 else "")


def _scale(limits: tuple[float, float], left: float, top: float, width: float) -> str:
    n = 40
    step = width / n
    parts = [
        f'<rect x="{left + i * step:.1f}" y="{top:.1f}" width="{step + 0.4:.1f}" height="7" '
        f'fill="{sequential(i / (n - 1))}"/>'
        for i in range(n)
    ]
    axis = Axis(*limits, left, left + width, fit=True)
    parts += [_text(axis(v), top + 20, short(v), "middle") for v in axis.ticks(4)]
    return "".join(parts)


def _described(lines: Sequence[Line]) -> str:
    """Describe the first and last value of each curve, for screen readers."""
    parts = []
    for line in lines[:12]:
        finite = line.y[np.isfinite(line.y)]
        parts.append(f"{line.label}: from {number(finite[0])} to {number(finite[-1])}")
    return "; ".join(parts) + "."


def _dash(cluster: int | None) -> str:
    lengths = DASHES[cluster % len(DASHES)] if cluster is not None else ()
    pattern = " ".join(f"{length:g}" for length in lengths)
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, description: str, parts: Sequence[str], height: float) -> str:
    label = escape(f"{title}. {description}".strip(), quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
