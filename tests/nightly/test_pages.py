"""The documentation as a browser shows it: nothing cut off, nothing loaded from elsewhere, no error."""

import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parents[2]
WIDTHS = 400, 1280, 1440
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium, which no package of Python brings"),
]
Look = Callable[[list[str]], dict[str, object]]


class Server(http.server.SimpleHTTPRequestHandler):
    """The pages, and a queue of what look.html posts."""

    posted: "queue.Queue[bytes]" = queue.Queue()

    def do_POST(self) -> None:
        self.posted.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built, with look.html beside them."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["mkdocs", "build", "--strict", "--quiet", "--site-dir", folder], cwd=ROOT, check=True)
    shutil.copy(Path(__file__).with_name("look.html"), folder)
    return folder


@pytest.fixture(scope="module")
def look(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Look]:
    """A function from pages to what look.html finds on them, and what the browser's console says of errors."""
    profile = tmp_path_factory.mktemp("profile")
    log = profile / "log"

    def found(pages: list[str]) -> dict[str, object]:
        address = f"http://127.0.0.1:{server.server_port}/look.html"
        what = quote(json.dumps({"pages": pages, "widths": WIDTHS}))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1600,1000"]
        with log.open("w") as stderr:
            browser = subprocess.Popen([BROWSER, *options, f"{address}#{what}"], stderr=stderr, text=True)
        try:
            posted = json.loads(Server.posted.get(timeout=120))
        finally:
            browser.kill()
            browser.wait()
        return posted | {"console": re.findall(r"CONSOLE\S* \"(.*?)\", source", log.read_text("utf8"))}

    handler = functools.partial(Server, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def test_pages_fit_at_every_width(site, look):
    found = [*site.glob("*.html"), *site.glob("tutorials/*.html")]
    pages = sorted(page.relative_to(site).as_posix() for page in found if page.name not in ("404.html", "look.html"))
    assert len(pages) > 10
    assert look(pages) == {"looked": len(pages) * len(WIDTHS), "found": [], "console": []}


def test_what_is_wrong_is_found(site, look):
    """The look itself: a page with a wide line, a formula that is cut off, a broken image and an error."""
    wide = "<math><mtext>" + "wide" * 200 + "</mtext></math><p style='width: 3000px'>-</p>"
    broken = f"<!doctype html><p>{wide}<img src=none.png><script>throw Error('planted')</script>"
    (site / "broken.html").write_text(broken, "utf8")
    found = look(["broken.html"])
    said = " ".join(found["found"])
    assert all(word in said for word in ("px wide", "cut off", "no image"))
    assert any("planted" in line for line in found["console"])
