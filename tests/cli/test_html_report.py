"""The page of `bilevax report`: whole, closed in itself, escaped, readable on a narrow screen."""

import base64
import html
import html.parser
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.show.html import band
from benchmarks.study import registry, suites

EVIL = "p[a=<script>console.error('evil')</script>&\"]"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(html.parser.HTMLParser):
    """Elements with attributes, text; every end tag must close the last open one."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(tag for tag, _ in self.open)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes, _ in self.found if tag == name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, synthetic):
    """Two problems, one with an optimum and a hostile name; a run that diverged, one unsupported, one unfinished."""
    rows, result, write = synthetic.rows, synthetic.result, synthetic.write
    values = {0: [10.0, 3.0, 1.0], 1: [12.0, 2.0, 1.5]}
    results = {("q", s, k): result(rows(values[k])) for k in (0, 1) for s in ("A[x=1]", "B")}
    results |= {(EVIL, s, 0): result(rows([5.0, 4.0, 3.5])) for s in ("A[x=1]", "B")}
    results[EVIL, "C", 0] = result(rows([5.0, 1e60, None]), "NONFINITE", reason="<b>too far</b>")
    results[EVIL, "D", 0] = result([], "UNSUPPORTED", reason="no & never")
    results[EVIL, "E", 0] = None
    counts = [{"oracles": 20.0 * k, "time": 0.5 * k, "count": k, "changed": k % 2} for k in range(3)]
    results["q", "B", 0] |= {"active": counts}
    grids = {"true reward": [[0.0, 1.0], [2.0, 3.0]], "learned reward": [[0.1, 0.9], [2.0, 3.0]]}
    results["q", "A[x=1]", 0] |= {"maps": grids}
    return write(tmp_path_factory.mktemp("page") / "run", results, optima={("q", 0): 0.5, ("q", 1): 1.0})


@pytest.fixture(scope="module")
def called(folder):
    return CliRunner().invoke(app, ["report", str(folder), "--tol", "0.1"])


@pytest.fixture(scope="module")
def text(folder, called):
    assert called.exit_code == 0, called.stderr
    return (folder / "report.html").read_text("utf8")


def test_the_page_is_closed_in_itself_and_runs_nothing(text):
    read = Reader(text)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, *_ in read.found}
    for _, attributes, _ in read.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"#|data:(image/svg\+xml;base64,|,)", attributes.get(name, "#")), attributes[name]
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for image in read.all("img"):
        svg = xml.etree.ElementTree.fromstring(base64.b64decode(image["src"].partition(",")[2]))
        assert svg.tag.endswith("}svg")
        links = [value for node in svg.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)  # maps are pixels inside
        assert not any(node.tag.endswith("}script") for node in svg.iter())


def test_values_stand_under_the_pointer(text):
    """At the first measurement of q, 0 passes, the median of A over both seeds: (10 - 0.5 + 12 - 1)/2."""
    titles = re.findall(r"<title>(.*?)</title></use>", text)
    assert "A: F - F* 10.25 after 0 passes" in titles
    assert any(title.endswith(" s") for title in titles)
    assert text.count('class="s0"') >= 3 * 2 * 2  # lines, bands and points of three columns, by calls and by time


def test_what_comes_from_results_is_escaped(text):
    assert EVIL not in text
    words = "".join(Reader(text).text)
    for part in (EVIL, "<b>too far</b>", "no & never"):
        assert part in words


def test_it_reads_on_a_narrow_screen_and_aloud(text):
    read = Reader(text)
    assert any(m.get("name") == "viewport" and "width=device-width" in m["content"] for m in read.all("meta"))
    tables = [above for tag, _, above in read.found if tag == "table"]
    assert tables
    assert all(above[-1] == "div" for above in tables)
    assert text.count('class="scroll"') == len(tables)
    assert all(image["alt"] for image in read.all("img"))
    assert read.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes, _ in read.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in read.all("a")} <= set(ids)


def test_it_says_how_to_repeat_the_run(folder, text, tmp_path):
    words = "".join(Reader(text).text)
    assert "bilevax run --suite custom.toml" in words
    assert "0.10.2" in words
    assert "1 cells are unfinished" in words
    cells = registry.grid(
        ["quadratic[dim_x=2]", "ridge"], ["AID", 'SOBA[upper_step_size="adam(0.1)"]'], 2, every=5, tol=0.0
    )
    for some in (suites.read_suite("quickstart")[1], cells):
        (tmp_path / "again.toml").write_text(suites.suite_text(some))
        assert suites.read_suite(str(tmp_path / "again.toml")) == ("again", some)


def test_bands_step_from_measurement_to_measurement():
    budgets, (low, middle, high) = band(
        [(np.array([0.0, 2.0]), np.array([8.0, 4.0])), (np.array([0.0, 1.0, 3.0]), np.array([6.0, 2.0, np.nan]))]
    )
    assert budgets.tolist() == [0, 1, 2, 3]
    assert middle.tolist() == [7, 5, 3, np.inf]
    assert low.tolist() == [6.5, 3.5, 2.5, np.inf]
    assert high.tolist() == [7.5, 6.5, 3.5, np.inf]


def test_active_sets_and_maps_are_drawn_where_there_are_any(text):
    alternatives = [image["alt"] for image in Reader(text).all("img")]
    assert alternatives.count("Active lower constraints on q by oracle calls") == 1
    assert alternatives.count("Reward over the cells of q") == 2


def test_the_command_names_the_page(folder, called, tmp_path):
    assert called.stdout.strip() == str(folder / "report.html")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page was not looked at in a browser")
def test_in_chromium_nothing_overflows_and_the_console_is_silent(folder, text, tmp_path):
    """In a frame 360 pixels wide, as on a telephone: the page does not scroll sideways, and every picture is drawn."""
    probe = """
        addEventListener("load", () => {
            const inner = document.querySelector("iframe").contentDocument;
            const pictures = [...inner.images];
            document.body.dataset.found = [inner.documentElement.scrollWidth, inner.documentElement.clientWidth,
                pictures.length, pictures.filter(p => p.complete && p.naturalWidth > 0).length].join(" ");
            const shown = () => getComputedStyle(inner.querySelector("#p1 .s0")).display;
            document.body.dataset.before = shown();
            inner.querySelector("#p1 .f0").click();
            document.body.dataset.after = shown() + " " + getComputedStyle(inner.querySelector("#p2 .s0")).display;
        });"""
    frame = f'<iframe width="360" height="700" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
    (tmp_path / "outer.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frame}<script>{probe}</script>")
    (tmp_path / "page.html").write_text(text)
    done = [
        subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
             "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / name).as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )
        for name in ("outer.html", "page.html")
    ]  # fmt: skip
    assert not [line for run in done for line in run.stderr.splitlines() if "CONSOLE" in line]
    scroll, client, pictures, drawn = map(int, re.search(r'data-found="([\d ]+)"', done[0].stdout).group(1).split())
    assert scroll <= client <= 360
    assert pictures == drawn == text.count("<img ")
    boxes = re.search(r'data-before="(.*?)" data-after="(.*?)"', done[0].stdout)
    assert boxes.groups() == ("inline", "none inline")  # a box hides a solver of its own section alone
    assert "<h1>A, B, C, D and 1 more on q, p</h1>" in done[1].stdout
