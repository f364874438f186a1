"""The page in a browser: it opens, sorts, filters, and runs nothing but its own script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostfunc as gf
from ghostfunc.data import Rows
from ghostfunc.report import Heat, write_report

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "{{data}} {{script}} <!-- --> ]]> &lt;b&gt;",
    "javascript:document.title='owned'",
    "\u2028\u2029\u202e\x00 half \ud800",
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Rows:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Rows.open(path)


def chats(n: int) -> list[dict[str, Any]]:
    kinds = {
        "sums": "How much is {i} and {i}?",
        "songs": "Sing me verse {i}.",
        "code": "Write f({i}).",
    }
    names = list(kinds)
    return [
        {
            "messages": [
                {"role": "user", "content": kinds[names[i % 3]].format(i=i)},
                {
                    "role": "assistant",
                    "content": f"Answer number {i}, at some length. " * (1 + i % 4),
                },
            ],
            "source": names[i % 3],
        }
        for i in range(n)
    ]


def scores_of(n: int) -> gf.Scores:
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([1.0, -0.4, 0.2])[torch.arange(n) % 3]
    dots = torch.randn(n, generator=generator) * 0.7 + kind
    losses = torch.rand(n, generator=generator) * 3
    return gf.Scores(range(n), {"dot_higher_helps": dots, "loss": losses}, {"model": "tiny<b>"})


class Opened:
    """A page in the browser, and all that went wrong on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", self._requested)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.wrong.append(request.url)

    def wait_for_count(self, pattern: str) -> None:
        """Until the number of samples that are shown reads like this."""
        from playwright.sync_api import expect

        expect(self.page.locator("#count")).to_have_text(re.compile(pattern))

    def texts(self, selector: str) -> list[str]:
        return list(self.page.locator(selector).all_inner_texts())


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_page(path: Path, width: int = 1280, height: int = 900, **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.goto(path.as_uri())
        return found

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Path]:
    def write(n: int = 200, **options: Any) -> Path:
        rows = jsonl(tmp_path / "pool.jsonl", chats(n))
        write_report(tmp_path / "r.html", scores_of(n), rows, **options)
        return tmp_path / "r.html"

    return write


def shown(opened: Opened) -> list[str]:
    """The ranks of the rows that are in the table."""
    return opened.texts(".row > :first-child")


def test_it_opens_with_the_best_and_the_worst(page_of: Any, opened: Any) -> None:
    found = opened(page_of(group="source"))
    assert found.page.title() == "Which samples help?"
    assert found.texts("#count") == ["200 samples"]
    values = scores_of(200)["dot_higher_helps"]
    best = [f"row {i}" for i in scores_of(200).top(5).ids]
    assert [text for text in found.texts(".best .meta") for row in best if row in text]
    assert all(row in text for row, text in zip(best, found.texts(".best .meta"), strict=True))
    worst = [f"row {i}" for i in scores_of(200).bottom(5).ids]
    assert all(row in text for row, text in zip(worst, found.texts(".worst .meta"), strict=True))
    assert f"{float((values > 0).double().mean()):.0%}" in found.texts(".tile b")
    assert shown(found)[:3] == ["1", "2", "3"]
    assert found.page.locator("#histogram rect").count() > 8
    assert found.page.locator("#groups circle").count() == 3
    assert found.wrong == []


def test_it_sorts(page_of: Any, opened: Any) -> None:
    found = opened(page_of(group="source"))
    losses = scores_of(200)["loss"]
    by_loss = losses.argsort().tolist()
    at = "[data-sort=loss]"
    found.page.click(at)
    rows = found.texts(".row > :nth-child(5)")
    assert rows[:10] == [str(i) for i in by_loss[:10]]
    found.page.click(at)
    assert found.texts(".row > :nth-child(5)")[:10] == [str(i) for i in by_loss[::-1][:10]]
    found.page.click("[data-sort=rank]")
    assert shown(found)[:2] == ["1", "2"]
    found.page.click("[data-sort=rank]")
    assert shown(found)[:2] == ["200", "199"]
    assert found.wrong == []


def test_it_filters(page_of: Any, opened: Any) -> None:
    found = opened(page_of(group="source"))
    found.page.fill("#search", "VERSE 1")
    found.wait_for_count(" of ")
    expected = [i for i in range(200) if i % 3 == 1 and str(i).startswith("1")]
    assert found.texts("#count") == [f"{len(expected)} of 200 samples"]
    found.page.fill("#search", "")
    found.wait_for_count("^200 samples$")
    found.page.select_option("#group", "code")
    found.page.select_option("#sign", "+")
    values = scores_of(200)["dot_higher_helps"]
    count = int(((values > 0) & (torch.arange(200) % 3 == 2)).sum())
    assert found.texts("#count") == [f"{count} of 200 samples"]
    found.page.fill("#search", "nothing like this")
    found.wait_for_count("^0 of")
    assert found.page.locator(".row").count() == 0
    assert found.wrong == []


def test_a_row_opens(page_of: Any, opened: Any) -> None:
    found = opened(page_of())
    found.page.click(".row >> nth=2")
    (text,) = found.texts("#detail .meta")
    assert "rank 3" in text
    found.page.focus("#table")
    found.page.keyboard.press("ArrowDown")
    (text,) = found.texts("#detail .meta")
    assert "rank 4" in text
    assert "ASSISTANT" in found.texts("#detail .text")[0].upper()
    assert found.wrong == []


def test_what_texts_hold_is_shown_and_never_run(tmp_path: Path, opened: Any) -> None:
    rows = [{"messages": [{"role": text, "content": text}], "source": text} for text in HOSTILE] + [
        {"text": text, "source": "x"} for text in HOSTILE
    ]
    data = jsonl(tmp_path / "pool.jsonl", rows)
    n = len(rows)
    columns = {"dot_higher_helps": torch.linspace(1, -1, n), HOSTILE[0]: torch.ones(n)}
    scores = gf.Scores(range(n), columns, {text: text for text in HOSTILE[:3]})
    heat = {1: Heat(HOSTILE, [0.1] * len(HOSTILE))}
    write_report(tmp_path / "r.html", scores, data, title=HOSTILE[1], group="source", heat=heat)
    found = opened(tmp_path / "r.html")
    for at in range(len(rows)):
        found.page.click(f".row >> nth={at}")
        found.page.wait_for_timeout(10)
    assert found.page.title() == HOSTILE[1]
    assert found.page.locator("script").count() == 2
    assert found.page.locator("img").count() == 0
    assert HOSTILE[0] in found.texts(".best .text")[0]
    assert HOSTILE[2] in "".join(found.texts(".card .text"))
    assert found.wrong == []


def test_foreign_scripts_are_refused_by_the_page_itself(page_of: Any, opened: Any) -> None:
    path = page_of(5)
    path.write_text(path.read_text().replace("</body>", f"{HOSTILE[0]}</body>"))
    found = opened(path)
    assert found.page.title() == "Which samples help?"
    assert any("Content Security Policy" in text for text in found.wrong)


def test_a_hundred_thousand_rows_do_not_stutter(page_of: Any, opened: Any, pictures: Path) -> None:
    n = 100_000
    found = opened(page_of(n, group="source"))
    assert found.texts("#count") == ["100,000 samples"]
    table = found.page.locator("#table")
    for place in (0.5, 1.0):
        table.evaluate(f"e => {{ e.scrollTop = e.scrollHeight * {place}; }}")
        found.page.wait_for_timeout(100)
        assert found.page.locator(".row").count() < 60
        ranks = [int(rank.replace(",", "")) for rank in shown(found)]
        assert min(ranks) <= place * n <= max(ranks) + 40
    assert shown(found)[-1] == "100,000"
    found.page.click("[data-sort=loss]")
    found.page.fill("#search", "verse 99")
    found.wait_for_count(" of ")
    expected = sum(i % 3 == 1 and str(i).startswith("99") for i in range(n))
    assert found.texts("#count") == [f"{expected:,} of 100,000 samples"]
    assert found.page.locator(".row").count() < 60
    assert found.wrong == []


def test_it_looks_right(page_of: Any, opened: Any, pictures: Path) -> None:
    """Pictures to look at; no content is wider than the page, light and dark differ."""
    top = scores_of(200).top(1).ids[0]
    pieces = ["How", " much", " is", f" {top}", " and", f" {top}", "?", "Answer", " number", "."]
    heat = {top: Heat(pieces, [0.1, -0.2, 0.05, 0.9, 0.1, -0.6, 0, 0.3, 0.5, -0.1])}
    path = page_of(group="source", heat=heat)
    colours = set()
    for name, width, scheme in (
        ("desktop", 1280, "light"),
        ("narrow", 390, "light"),
        ("dark", 1280, "dark"),
    ):
        found = opened(path, width=width, color_scheme=scheme)
        found.page.click(".row >> nth=0")
        found.page.screenshot(path=pictures / f"report-{name}.png", full_page=True)
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        colours.add(found.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert found.wrong == []
    assert len(colours) == 2
    found.page.click("#theme")
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") in colours
    found.page.emulate_media(media="print")
    assert not found.page.locator("#table").is_visible()
    assert found.page.locator(".best .card").count() == 5


# --- without a browser ------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(page_of: Any) -> None:
    text = page_of().read_text()
    for sign in ("http:", "https:", "src=", "@import", "url("):
        assert sign not in text.replace("http://www.w3.org/2000/svg", "")


def test_errors(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "pool.jsonl", chats(3))
    with pytest.raises(gf.OptionError, match="is no row of 3"):
        write_report(tmp_path / "r.html", scores_of(4), rows)
    with pytest.raises(gf.OptionError, match="no row has a column 'nothing'"):
        write_report(tmp_path / "r.html", scores_of(3), rows, group="nothing")
    assert not (tmp_path / "r.html").exists()


def test_columns_of_any_kind_are_shown(tmp_path: Path) -> None:
    rows = jsonl(
        tmp_path / "pool.jsonl",
        [
            {"text": "plain"},
            {"prompt": "before ", "completion": "after"},
            {
                "prompt": [{"role": "user", "content": "asks"}],
                "completion": [{"role": "assistant", "content": "says"}],
            },
            {"other": "thing"},
        ],
    )
    write_report(tmp_path / "r.html", scores_of(4), rows)
    text = (tmp_path / "r.html").read_text()
    for word in ("plain", "before ", "after", "asks", "says", "thing"):
        assert word in text
