"""Runs the notebooks of docs/tutorials and writes their pages: python docs/notebooks.py [NAME…], by default all.

A notebook is a Python file with cells, `# %%` for code and `# %% [markdown]` for text in comments: Jupyter (by
jupytext), VS Code and plain Python open it. Its page beside it is the same text and code with what the code printed and
drew. Pages are committed, so that nobody who builds the documentation waits for a study; `current` says whether a page
is of the notebook as it is, and the tests run the notebooks again.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "tutorials"
MARK = "<!-- written by python docs/notebooks.py -->\n"
CELL = re.compile(r"^# %%(?P<kind> \[markdown\])?[^\n]*\n", re.MULTILINE)
OUTPUT = re.compile(r'^```text title="Output"\n.*?^```\n+|^!\[[^\n]*\]\([^\n]*\.svg\)\n+', re.MULTILINE | re.DOTALL)


HEAD = """# Tutorials

Each is a notebook that was run as it stands: what it printed and drew is on its page. The files are beside these pages
in `docs/tutorials`, as Python with cells, which Jupyter (with jupytext), VS Code and plain Python open;
`python docs/notebooks.py` runs them again.
"""


class Cell(NamedTuple):
    """A cell of a notebook."""

    code: bool
    text: str
    line: int
    """Where it begins in the file, from 1."""


def names() -> list[str]:
    """The notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def cells(text: str) -> list[Cell]:
    """The cells of a notebook; what stands before the first is none."""
    marks = list(CELL.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        body, line = text[mark.end() : end].strip("\n"), text.count("\n", 0, mark.end()) + 1
        if mark["kind"]:
            body = "\n".join(re.sub(r"^# ?", "", row) for row in body.split("\n"))
        found.append(Cell(mark["kind"] is None, body, line))
    return found


def run(name: str) -> tuple[str, dict[str, bytes]]:
    """(the page, {file: picture}) of a notebook, run in a namespace of its own."""
    import matplotlib

    matplotlib.use("agg")
    path, pictures = FOLDER / f"{name}.py", {}
    namespace: dict[str, Any] = {"__name__": "notebook"}
    parts = [MARK]
    for cell in cells(path.read_text("utf8")):
        if not cell.code:
            parts.append(cell.text + "\n")
            continue
        printed, drawn = _run_cell(cell, path, namespace)
        parts.append(f"```python\n{cell.text}\n```\n")
        if printed.strip():
            parts.append(f'```text title="Output"\n{printed.rstrip()}\n```\n')
        for picture in drawn:
            file = f"{name}-{len(pictures) + 1}.svg"
            pictures[file] = picture
            parts.append(f"![What the code above draws]({file})\n")
    return "\n".join(parts), pictures


def _run_cell(cell: Cell, path: Path, namespace: dict[str, Any]) -> tuple[str, list[bytes]]:
    """(what the cell printed, the figures that it left open)."""
    import matplotlib
    import matplotlib.pyplot as plt

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (cell.line - 1) + cell.text, str(path), "exec"), namespace)
    drawn = []
    for number in plt.get_fignums():
        stream = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
            plt.figure(number).savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight")
        drawn.append(stream.getvalue())
    plt.close("all")
    return re.sub(r"[ \t]+$", "", printed.getvalue(), flags=re.MULTILINE), drawn


def current(name: str) -> bool:
    """Whether the page has the notebook's text and code as they are, whatever its outputs."""
    page = FOLDER / f"{name}.md"
    if not page.exists():
        return False
    parts = [MARK] + [
        f"```python\n{cell.text}\n```\n" if cell.code else cell.text + "\n"
        for cell in cells((FOLDER / f"{name}.py").read_text("utf8"))
    ]
    squeeze = lambda text: re.sub(r"\n\n+", "\n\n", text).strip()  # noqa: E731
    return squeeze(OUTPUT.sub("", page.read_text("utf8"))) == squeeze("\n".join(parts))


def gallery() -> str:
    """The page with the title, a picture and the first sentence of each notebook, in the order of the navigation."""
    order = re.findall(r"tutorials/(\w+)\.md", (FOLDER.parents[1] / "mkdocs.yml").read_text("utf8"))
    entries = []
    for name in [name for name in order if name != "index"]:
        page = (FOLDER / f"{name}.md").read_text("utf8")
        found = re.search(r"^# (?P<title>.+)\n+(?P<text>(?:.+\n)+)", page, re.MULTILINE)
        title, text = (found["title"], found["text"]) if found else (name, "")
        sentence = re.split(r"(?<=[.?:])\s", " ".join(text.split()))[0]
        picture = next(iter(sorted(FOLDER.glob(f"{name}-[0-9]*.svg"))), None)
        shown = "" if picture is None else f"[![]({picture.name}){{ .thumbnail }}]({name}.md)"
        entries.append(f"## [{title}]({name}.md)\n\n{sentence}\n\n{shown}\n")
    return "\n".join([MARK, HEAD, *entries])


def write(name: str) -> None:
    """Run a notebook and write its page and pictures in place of the old ones."""
    page, pictures = run(name)
    for old in FOLDER.glob(f"{name}-[0-9]*.svg"):
        old.unlink()
    for file, picture in pictures.items():
        (FOLDER / file).write_bytes(picture)
    (FOLDER / f"{name}.md").write_text(page, "utf8")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or names():
        write(chosen)
        print(chosen)
    (FOLDER / "index.md").write_text(gallery(), "utf8")
