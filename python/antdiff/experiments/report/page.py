"""The HTML of a report: one self-contained document."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from antdiff.plotting.palette import cluster_colours


def section(name: str, title: str, parts: Iterable[str]) -> tuple[str, str, str]:
    """Return the anchor, the title and the HTML of a section."""
    head = f"<section id='{name}' aria-labelledby='h-{name}'><h2 id='h-{name}'>{title}</h2>"
    return name, title, f"{head}{''.join(parts)}</section>"


def figure(title: str, picture: str, means: str = "", means_not: str = "", *, kind: str = "") -> str:
    """Return a picture with two captions: what it shows, and what it does not show.

    Args:
        kind: class in the style sheet. "wide" takes the whole row, "key" only as much height as it needs.
    """
    if not picture:
        picture = "<p>Nothing was measured.</p>"
    caption = f"<p>{escape(means)}</p>" if means else ""
    if means_not:
        caption += f"<p class='not'><b>Does not show:</b> {escape(means_not)}</p>"
    if caption:
        caption = f"<figcaption>{caption}</figcaption>"
    opening = f"<figure class='{kind}'>" if kind else "<figure>"
    return f"{opening}<h3>{escape(title)}</h3>{picture}{caption}</figure>"


def grid(figures: Iterable[str]) -> str:
    return f"<div class='figures'>{''.join(figures)}</div>"


def image(path: Path, alt: str) -> str:
    """Return a PNG file as an inline image."""
    from PIL import Image

    with Image.open(path) as opened:
        width, height = opened.size
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img src='data:image/png;base64,{data}' width='{width}' height='{height}' alt='{escape(alt, quote=True)}'>"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    """Return a table. The first column holds the row names, the others numbers unless `text`."""
    cell = "td" if text else "td class='num'"
    styles = ["" if text or i == 0 else " class='num'" for i in range(len(heads))]
    head = "".join(f"<th scope='col'{style}>{escape(name)}</th>" for name, style in zip(heads, styles, strict=True))
    body = "".join(
        f"<tr><th scope='row'>{escape(first)}</th>"
        + "".join(f"<{cell}>{escape(value)}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return wide(caption, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", caption or heads[0])


def wide(title: str, content: str, label: str) -> str:
    """Return a card for wide content, which scrolls sideways on narrow screens."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    label = escape(label, quote=True)
    scroll = f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'>{content}</div>"
    return f"<div class='table'>{head}{scroll}</div>"


def document(title: str, head: str, sections: Sequence[tuple[str, str, str]], k: int, source: str) -> str:
    """Return the HTML file: style, head, links to the sections, and the sections."""
    links = "".join(f"<a href='#{name}'>{title}</a>" for name, title, _ in sections)
    style = files("antdiff.experiments.report").joinpath("style.css").read_text(encoding="utf-8")
    light, dark = (_colours(cluster_colours(k, dark=dark)) for dark in (False, True))
    style += f"{light}@media (prefers-color-scheme: dark) {{ {dark} }}@media print {{ {light} }}"
    hatches = "".join(
        f"<pattern id='negative-{name}' width='5' height='5' patternUnits='userSpaceOnUse' "
        "patternTransform='rotate(45)'>"
        f"<line x1='0' y1='0' x2='0' y2='5' stroke='{ink}' stroke-width='1.6' opacity='0.7'/></pattern>"
        for name, ink in (("on-dark", "#fff"), ("on-light", "#000"))
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<svg class='defs' aria-hidden='true'><defs>{hatches}</defs></svg>"
        f"<header>{head}</header><nav aria-label='Sections'>{links}</nav>"
        f"<main>{''.join(body for *_, body in sections)}</main><footer>{escape(source)}</footer></body></html>\n"
    )


def _colours(colours: Sequence[str]) -> str:
    return "".join(
        f"svg .c{i}, svg .c{i} .line, svg .c{i} .spread {{ stroke: {colour}; }} "
        f"svg .c{i} .end, svg .c{i} .dot, svg .c{i} .block {{ fill: {colour}; stroke: none; }}\n"
        for i, colour in enumerate(colours)
    )
