"""The documentation's first page in a browser: it is whole, and loads nothing from elsewhere."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """The log would stand among the tests' output."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site with its first page alone, behind an address: `make docs` builds all of it, and
    takes a minute."""
    mkdocs = pytest.importorskip("mkdocs.config")
    build = pytest.importorskip("mkdocs.commands.build")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    shutil.copy(ROOT / "docs" / "index.md", folder / "docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = mkdocs.load_config(
            str(ROOT / "mkdocs.yml"),
            docs_dir=str(folder / "docs"),
            site_dir=str(folder / "site"),
            plugins=["search"],
            hooks=[],
            nav=[{"First page": "index.md"}],
            strict=False,
        )
        build.build(config)
    serve = partial(Quiet, directory=str(folder / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_first_page_of_the_site(browser: Any, site: str, pictures: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 1100})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda x: None if x.url.startswith((site, "data:")) else wrong.append(x.url))
    page.goto(site)
    page.screenshot(path=pictures / f"site-{width}.png")
    assert page.locator("h1").inner_text().startswith("ghostfunc")
    sizes = "all => all.map(e => [e.naturalWidth, e.getBoundingClientRect().right])"
    ((natural, right),) = page.locator("article img").evaluate_all(sizes)
    assert natural >= 1000
    assert right <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "ghostfunc score model --pool pool.jsonl" in page.locator("pre").first.inner_text()
    assert wrong == []
    context.close()
