"""The tutorials: pages of the notebooks as they are, in navigation and gallery; two are run, all of them at night."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN_HERE = "gridworld", "guarantee"  # the others: tests/nightly/test_tutorials.py


def loaded():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = loaded()


@pytest.mark.parametrize("name", notebooks.names())
def test_the_page_is_the_notebook_s(name):
    """If not: python docs/notebooks.py NAME."""
    assert notebooks.current(name)
    page = (notebooks.FOLDER / f"{name}.md").read_text("utf8")
    pictures = re.findall(r"^!\[[^]]+\]\(([^)]+)\)$", page, re.MULTILINE)
    assert pictures
    assert {path.name for path in notebooks.FOLDER.glob(f"{name}-*.svg")} == set(pictures)
    assert "Output" in page
    assert f"tutorials/{name}.md" in (ROOT / "mkdocs.yml").read_text("utf8")


def test_the_gallery_is_current():
    assert (notebooks.FOLDER / "index.md").read_text("utf8") == notebooks.gallery()


def test_a_changed_notebook_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    text = "# %% [markdown]\n# # Title\n# %%\nprint(1 + 1)\n"
    (tmp_path / "one.py").write_text(text)
    notebooks.write("one")
    assert (tmp_path / "one.md").read_text() == (
        notebooks.MARK + '\n# Title\n\n```python\nprint(1 + 1)\n```\n\n```text title="Output"\n2\n```\n'
    )
    assert notebooks.current("one")
    (tmp_path / "one.py").write_text(text.replace("1 + 1", "1 + 2"))
    assert not notebooks.current("one")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_HERE)
def test_a_tutorial_runs(name):
    page, pictures = notebooks.run(name)
    assert pictures
    assert "Output" in page
