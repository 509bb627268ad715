"""A figure as SVG inside of a page, with values under the pointer and solvers that can be hidden, without any script.

A browser shows the `<title>` of an element under the pointer, and a style sheet can ask whether a box is ticked: so the
page needs to run nothing. What belongs to solver k of a figure has the class `s{k}`.
"""

import html
import io
import re
from typing import Any

import numpy as np

MOST = 200  # points of a curve that have a value; of longer ones as many, evenly


def mark(artist: Any, k: int, what: str) -> None:
    """Say that an artist belongs to solver k; `what` is a word of its own within the figure."""
    artist.set_gid(f"s{k}__{what}")


def points(ax: Any, k: int, x: np.ndarray, y: np.ndarray, words: list[str], what: str) -> dict[str, list[str]]:
    """Draw unseen points of solver k that have `words`; return {their name: their words} for `inline`."""
    seen = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (ax.get_yscale() != "log"))
    chosen = np.flatnonzero(seen)
    if chosen.size > MOST:
        chosen = chosen[np.linspace(0, chosen.size - 1, MOST).astype(int)]
    if not chosen.size:
        return {}
    drawn = ax.scatter(x[chosen], y[chosen], s=60, c="#000000", alpha=0.0, linewidths=0)
    mark(drawn, k, what)
    return {f"s{k}__{what}": [words[i] for i in chosen]}


def inline(figure: Any, key: str, words: dict[str, list[str]]) -> str:
    """The figure as an element <svg>. `key` goes before its ids, which are then the page's only ones; the same bytes
    for the same figure.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "bilevax"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name, said in words.items():
        start = text.index(f'<g id="{name}"')
        end = text.index("</g>", start)  # of the uses, which stand in a group of their own
        text = text[:start] + _titled(text[start:end], said) + text[end:]
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{key}-", text)
    return re.sub(rf'<g id="{re.escape(key)}-(s\d+)__', r'<g class="\1" id="' + key + r"-\1__", text)


def _titled(group: str, words: list[str]) -> str:
    """The group's uses, each with its words."""
    found = iter(words)
    return re.sub(
        r"<use ([^>]*?)/>", lambda use: f"<use {use[1]}><title>{html.escape(next(found, ''))}</title></use>", group
    )
