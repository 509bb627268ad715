"""Mathematics of the pages as MathML, made while they are built: mkdocs calls `on_page_content` for each page.

`pymdownx.arithmatex` marks what stands between dollar signs, and leaves it as TeX. A browser shows MathML by itself, so
that a page loads no script and no font. What `latex2mathml` does not know it passes on as it is; here that is an error.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
UNKNOWN = re.compile(r"\\[A-Za-z]+|<m[io]>&</m[io]>")


def mathml(tex: str, display: bool) -> str:
    """The formula `tex` as an element <math>; ValueError where it holds a command that is not known."""
    element = convert(tex.strip(), display="block" if display else "inline")
    unknown = UNKNOWN.search(element)
    if unknown:
        raise ValueError(f"{tex.strip()}: {unknown.group()} is not known to latex2mathml")
    return element


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """`content` with its formulas as MathML; those on lines of their own in a box that scrolls where it must."""

    def typeset(found: re.Match[str]) -> str:
        display = found["tag"] == "div"
        try:
            element = mathml(html.unescape(found["tex"]), display)
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from None
        return f'<div class="formula">{element}</div>' if display else element

    return MARKED.sub(typeset, content)
