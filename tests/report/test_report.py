"""The page in a browser: it opens, sorts, filters, and runs nothing but its own script."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ghostfunc as gf
from ghostfunc.data import Rows
from ghostfunc.report import Heat, Timeline, write_report
from ghostfunc.report._page import _parts, _said_where

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


OVER_TIME = Timeline(
    [10, 20, 30, 40],
    {
        "sums": [0.3, 0.2, 0.15, 0.1],
        "songs": [-0.2, None, -0.05, -0.1],
        "<b>code": [0.1, 0.0, 0.05, 0.02],
    },
    "shapley",
)


def templated(i: int) -> tuple[list[str], list[float]]:
    """The tokens of a chat about sums as a template writes it, and shares of them."""
    assert i % 3 == 0
    answer = f"Answer number {i}, at some length. " * (1 + i % 4)
    text = f"<|user|>How much is {i} and {i}?<|end|><|assistant|>{answer.strip()}<|end|>"
    pieces = re.findall(r"<\|\w+\|>| ?\w+|\W", text)
    assert "".join(pieces) == text
    generator = torch.Generator().manual_seed(1)
    return pieces, torch.randn(len(pieces), generator=generator).tolist()


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

    def drawn(self, selector: str) -> list[str]:
        """Texts within a chart."""
        return list(self.page.locator(selector).all_text_contents())


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


MANY = 100_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a hundred thousand samples."""
    folder = tmp_path_factory.mktemp("many")
    rows = jsonl(folder / "pool.jsonl", chats(MANY))
    write_report(folder / "r.html", scores_of(MANY), rows, group="source")
    return folder / "r.html"


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


def test_a_hundred_thousand_rows_do_not_stutter(many: Path, opened: Any) -> None:
    n = MANY
    found = opened(many)
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
    heat = {top: Heat(*templated(top))}
    path = page_of(group="source", heat=heat, timeline=OVER_TIME)
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


def test_tiles_fill_their_rows_and_medians_are_written(
    page_of: Any, opened: Any, pictures: Path
) -> None:
    """The picture of the documentation. Rows of tiles end where the page does, at any width and in
    print; the colours of tokens are explained below the tokens."""
    top = scores_of(200).top(1).ids[0]
    path = page_of(group="source", heat={top: Heat(*templated(top))})
    for width in (1280, 700, 390, 320):
        found = opened(path, width=width)
        for medium in ("screen", "print"):
            found.page.emulate_media(media=medium)
            boxes = [x.bounding_box() for x in found.page.locator(".tile").all()]
            ends = {round(x["y"]): x["x"] + x["width"] for x in boxes}  # of the last in a row
            whole = found.page.locator("#tiles").bounding_box()
            assert len(ends) == (1 if medium == "screen" and width == 1280 else 2)
            assert all(abs(x - whole["x"] - whole["width"]) < 1 for x in ends.values())
        assert found.page.locator(".scale").count() == 1  # one sample has shares of its tokens
        tokens = found.page.locator(".best .card .text").first.bounding_box()
        scale = found.page.locator(".best .card .scale").first.bounding_box()
        assert 0 < scale["y"] - tokens["y"] - tokens["height"] < 40
        medians = found.drawn("#groups .value")
        assert len(medians) == 3
        assert all(re.fullmatch(r"[+−][\d.]+", text) for text in medians)
        if width == 1280:
            found.page.emulate_media(media="screen")
            clip = {"x": 0, "y": 0, "width": 1280, "height": 790}
            found.page.screenshot(path=pictures / "report.png", clip=clip)
        assert found.wrong == []


def test_tokens_stand_under_the_roles_of_their_messages(page_of: Any, opened: Any) -> None:
    top = scores_of(200).top(1).ids[0]
    pieces, shares = templated(top)
    found = opened(page_of(heat={top: Heat(pieces, shares)}))
    card = found.page.locator(".best .card").first
    assert card.locator(".role").all_text_contents() == ["user", "assistant"]
    added = "".join(card.locator(".template").all_text_contents())
    assert added == "<|user|><|end|><|assistant|><|end|>"
    spans = card.locator(".text > span:not(.role)")
    assert spans.all_text_contents() == pieces
    assert [float(x.replace("\u2212", "-")) for x in card.locator("[title]").evaluate_all(
        "all => all.map(e => e.title)"
    )] == pytest.approx(shares, rel=6e-3)  # fmt: skip
    assert found.wrong == []


INSTRUCTION = "You are a helpful assistant that answers in full sentences. " * 8


def test_what_many_samples_share_is_folded_away(tmp_path: Path, opened: Any) -> None:
    """The text of a system, and that of a template: what is said comes first, and fits."""
    rows = chats(4)
    rows[0]["messages"].insert(0, {"role": "system", "content": INSTRUCTION})
    data = jsonl(tmp_path / "pool.jsonl", rows)
    scores = gf.Scores(range(4), {"dot_higher_helps": torch.arange(4.0, 0, -1)}, {})
    added = re.findall(r" ?\w+|\W", f"<|system|>{INSTRUCTION}<|end|><|user|>")
    pieces = [*added, *re.findall(r" ?\w+|\W", "Write f(2)."), "<|end|>"]
    heat = {2: Heat(pieces, [0.01] * len(pieces))}
    write_report(tmp_path / "r.html", scores, data, heat=heat)
    found = opened(tmp_path / "r.html")
    said, with_template = (
        found.page.locator(".card", has_text=f"row {i}").locator(".text").first for i in (0, 2)
    )
    for text, summary, first in (
        (said, f"system: {len(INSTRUCTION)} letters", "How much is 0 and 0?"),
        (with_template, f"template: {len(added)} tokens, +{0.01 * len(added):.2f}", "Write f(2)."),
    ):
        assert text.locator("summary").all_text_contents() == [summary]
        shown = text.inner_text()
        assert "helpful" not in shown
        assert first in shown
        text.locator("summary").click()
        assert "helpful" in text.inner_text()
    assert found.texts(".row .words")[0].startswith("user: How much")
    assert found.wrong == []


def test_scores_have_their_units(page_of: Any, opened: Any) -> None:
    found = opened(page_of(group="source"))
    best = float(scores_of(200)["dot_higher_helps"].max())
    assert found.texts("figcaption")[0].endswith("dot product (loss per unit of learning rate)")
    (about,) = found.texts("#about")
    step = f"at a learning rate of 0.001, the step lowers the target's loss by {best / 1e3:#.3g}"
    assert step in about
    assert all(text.split("\n")[1] == "dot product" for text in found.texts(".card .meta"))


def test_a_step_is_one_that_changes_little(tmp_path: Path, opened: Any) -> None:
    rows = jsonl(tmp_path / "pool.jsonl", chats(2))
    scores = gf.Scores(range(2), {"dot_higher_helps": torch.tensor([7480.0, 61.0])}, {})
    write_report(tmp_path / "r.html", scores, rows)
    (about,) = opened(tmp_path / "r.html").texts("#about")
    assert "at a learning rate of 0.00001, the step lowers the target's loss by 0.0748" in about


def test_a_narrow_page_needs_no_sideways_scrolling(page_of: Any, opened: Any) -> None:
    found = opened(page_of(group="source"), width=390)
    assert found.page.evaluate("document.querySelector('#table').scrollWidth") <= 390
    sizes = "all => all.map(e => e.getBoundingClientRect().height)"
    (height,) = set(found.page.locator("#histogram svg, #groups svg").evaluate_all(
        "all => all.map(e => e.viewBox.baseVal.width === Math.round(e.clientWidth))"
    ))  # fmt: skip
    assert height  # labels have the size that the style says
    assert min(found.page.locator(".row").evaluate_all(sizes)) > 50
    found.page.select_option("#sort", "loss↓")
    by_loss = scores_of(200)["loss"].argsort(descending=True).tolist()
    ranks = [int(x) for x in found.texts(".row > :first-child")]
    order = scores_of(200)["dot_higher_helps"].argsort(descending=True, stable=True).tolist()
    assert [order[rank - 1] for rank in ranks[:5]] == by_loss[:5]
    found.page.set_viewport_size({"width": 1280, "height": 900})
    found.page.locator("#head").wait_for(state="visible")
    assert not found.page.locator("#sort").is_visible()
    assert found.wrong == []


@pytest.mark.parametrize("n", [1_000, MANY])
def test_a_scroll_writes_the_rows_that_come_into_view(
    page_of: Any, many: Path, opened: Any, n: int
) -> None:
    """Counted, since times depend on the machine: rows that stay are not touched, no node is made,
    and the browser lays the page out once a frame, whatever the number of samples."""
    found = opened(many if n == MANY else page_of(n))
    count = """async ([times, pixels]) => {
      const table = document.querySelector("#table");
      let changes = 0, added = 0;
      const watch = (list) => list.forEach((m) => {
        if (m.target.id === "rows") added += m.addedNodes.length;
        else changes += m.type === "characterData" ? 1 : 1000;
      });
      const observer = new MutationObserver(watch);
      const kinds = { subtree: true, childList: true, characterData: true };
      observer.observe(document.querySelector("#rows"), kinds);
      const next = (done) => requestAnimationFrame(() => requestAnimationFrame(done));
      const frame = () => new Promise(next);
      for (let k = 0; k < times; k++) { table.scrollTop += pixels; await frame(); }
      watch(observer.takeRecords());
      observer.disconnect();
      return [changes, added];
    }"""
    cells = found.page.locator(".row").first.locator("span").count()
    found.page.evaluate(count, [10, 34])  # away from the upper end
    session = found.page.context.new_cdp_session(found.page)
    session.send("Performance.enable")

    def metrics() -> dict[str, float]:
        return {x["name"]: x["value"] for x in session.send("Performance.getMetrics")["metrics"]}

    before = metrics()
    changes, moved = found.page.evaluate(count, [20, 34])
    after = metrics()
    assert 0 < changes <= 21 * cells
    assert moved <= 21
    assert after["LayoutCount"] - before["LayoutCount"] <= 21
    assert after["Nodes"] - before["Nodes"] <= 5
    rows = found.page.locator(".row")
    tops = rows.evaluate_all("all => all.map(e => e.getBoundingClientRect().top)")
    assert tops == sorted(tops)  # the order of the page is that of the eye
    ranks = [int(rank.replace(",", "")) for rank in shown(found)]
    assert ranks == list(range(ranks[0], ranks[0] + len(ranks)))


def test_a_search_looks_at_samples_in_slices(page_of: Any, opened: Any) -> None:
    """What is typed meanwhile counts, and the one before it is given up."""
    found = opened(page_of(20_000))
    found.page.evaluate("""() => {
      window.pauses = 0;
      const wait = window.setTimeout;
      window.setTimeout = (f, ms) => { if (ms === undefined) window.pauses++; return wait(f, ms); };
    }""")
    found.page.fill("#search", "verse 1999")
    found.wait_for_count("of 20,000 samples")
    expected = sum(i % 3 == 1 and str(i).startswith("1999") for i in range(20_000))
    assert found.texts("#count") == [f"{expected} of 20,000 samples"]
    assert found.page.evaluate("window.pauses") == 4
    found.page.evaluate("""() => {
      const search = document.querySelector("#search"), sign = document.querySelector("#sign");
      search.value = "verse";
      sign.dispatchEvent(new Event("change"));
      search.value = "verse 19999";
      sign.dispatchEvent(new Event("change"));
    }""")
    found.wait_for_count("^1 of")
    assert found.wrong == []


def test_axes(tmp_path: Path, opened: Any) -> None:
    """Numbers under charts are round, and zero is left out where it would leave a void."""
    rows = jsonl(tmp_path / "pool.jsonl", chats(50))
    for low, zero in ((0.0, True), (5.0, False), (-6.0, False)):
        values = torch.linspace(low, low + 1, 50)
        scores = gf.Scores(range(50), {"dot_higher_helps": values}, {})
        write_report(tmp_path / "r.html", scores, rows)
        found = opened(tmp_path / "r.html")
        numbers = found.drawn("#histogram text")
        said = next(x for x in numbers if "tallest" in x)
        ticks = [float(x.replace("−", "-")) for x in numbers if "tallest" not in x]
        assert len(ticks) >= 4
        assert low - 0.01 <= ticks[0] < ticks[-1] <= low + 1.01
        steps = {round(b - a, 6) for a, b in pairwise(ticks)}
        assert len(steps) == 1
        assert (found.page.locator("#histogram .axis").count() == 1) is zero
        assert ("which is outside" in said) is not zero
    write_report(tmp_path / "r.html", scores_of(50), rows, timeline=OVER_TIME)
    found = opened(tmp_path / "r.html")
    numbers = found.drawn("#timeline text")
    assert {"10", "40", "training step"} <= {*numbers}
    assert len(numbers) >= 9


def test_values_over_training_time(page_of: Any, opened: Any) -> None:
    found = opened(page_of(timeline=OVER_TIME))
    assert found.page.locator("#timeline circle").count() == 11
    assert found.page.locator("#timeline path").count() == 3
    assert found.texts("#timeline .keys > span") == ["sums", "songs", "<b>code"]
    assert "mean shapley" in found.texts("#timeline figcaption")[0]
    assert found.wrong == []


def png(colour: str, mode: str = "RGB") -> bytes:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new(mode, (400, 200), colour).save(out, "PNG")
    return out.getvalue()


def pool_of_images(tmp_path: Path) -> Rows:
    """Images in all the ways that a row may hold them."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "blue.png").write_bytes(png("blue"))
    address = "data:image/png;base64," + base64.b64encode(png("red", "RGBA")).decode()
    rows = [{"image": "images/blue.png", "label": "sea"}, {"image": address}, {"label": "none"}]
    return jsonl(tmp_path / "pool.jsonl", rows)


def test_images_stand_beside_samples(tmp_path: Path, opened: Any, pictures: Path) -> None:
    rows = pool_of_images(tmp_path)
    write_report(tmp_path / "r.html", scores_of(3), rows, image="image")
    for width in (1280, 390):
        found = opened(tmp_path / "r.html", width=width)
        assert found.page.locator(".row img").count() == 2
        assert found.page.locator(".ends img").count() == 2
        sizes = "all => all.map(e => [e.naturalWidth, e.naturalHeight])"
        assert found.page.locator("img").evaluate_all(sizes) == [[160, 80]] * 4
        assert "base64" not in found.page.inner_text("body")
        found.page.screenshot(path=pictures / f"images-{width}.png", full_page=True)
        assert found.wrong == []


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


def test_images_of_tables_that_hold_bytes(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [{"bytes": png("green"), "path": "x.png"}, None], "text": ["a", "b"]}
    )
    pq.write_table(table, tmp_path / "pool.parquet")
    rows = Rows.open(tmp_path / "pool.parquet")
    write_report(tmp_path / "r.html", scores_of(2), rows, image="image")
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg;base64,") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("../secret.png", "is not within"),
        ("/etc/passwd", "is not within"),
        ("pool.jsonl", "that Pillow does not read"),
        ("nothing.png", "cannot be read"),
        ("data:image/png;base64,????", "not base64"),
        ("data:image/png;base64,\u00e9", "not base64"),
        ("data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=", "that Pillow does not read"),
        (3, "has a int"),
    ],
)
def test_what_is_no_image(tmp_path: Path, value: Any, said: str) -> None:
    (tmp_path / "secret.png").write_bytes(png("blue"))
    (tmp_path / "in").mkdir()
    rows = jsonl(tmp_path / "in" / "pool.jsonl", [{"image": value}])
    with pytest.raises(gf.OptionError, match=f"line 1: the image column 'image'.*{said}"):
        write_report(tmp_path / "r.html", scores_of(1), rows, image="image")
    with pytest.raises(gf.OptionError, match="no row has a column 'picture'"):
        write_report(tmp_path / "r.html", scores_of(1), rows, image="picture")
    assert not (tmp_path / "r.html").exists()


def test_texts_of_systems_are_cut_first() -> None:
    messages = [{"role": r, "content": r[0] * 200} for r in ("system", "user", "assistant")]
    parts = _parts({"messages": messages}, 300)
    assert parts == [["user", "u" * 200], ["assistant", "a" * 99 + "…"]]
    assert _parts({"messages": messages}, 450)[0] == ["system", "s" * 48 + "…"]
    many = [{"role": "user" * 1000, "content": ""}] * 100_000
    assert len(str(_parts({"messages": many}, 300))) < 30_000


def test_roles_are_found_among_tokens() -> None:
    parts = [["user", " a b "], ["assistant", "a b c"], ["user", "long " * 20], ["user", "gone"]]
    pieces = ["<u>", " a", " b", "</u>", "a", " b", " c", "<u>", *["long "] * 8]
    assert _said_where(parts, pieces) == [
        [1, 3, "user"],
        [4, 7, "assistant"],
        [8, 16, "user"],
    ]
