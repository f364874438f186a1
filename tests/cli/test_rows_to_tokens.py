"""Rows to tokens: what is labelled, what is refused and with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ghostfunc as gf
from ghostfunc.data import Encoded, Rows, RowsError, encode
from ghostfunc.data._chats import pieces_of

from .conftest import bytes_tokenizer, lines

TOKENIZER = bytes_tokenizer()
Run = Callable[..., tuple[int, str]]


def encoded(tmp_path: Path, *rows: Any, **options: Any) -> Encoded:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(rows))
    return encode(Rows.open(path), TOKENIZER, **{"max_length": 1000, **options})


def learned(found: Encoded, index: int = 0) -> str:
    """The text of the labels."""
    sample = found[index]
    return str(TOKENIZER.decode(sample["labels"][sample["labels"] != -100]))


def whole(found: Encoded, index: int = 0) -> str:
    return str(TOKENIZER.decode(found[index]["input_ids"]))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_only_the_assistant_is_learned(tmp_path: Path) -> None:
    messages = [
        said("system", "S"),
        said("user", "<|assistant|>A?"),
        said("assistant", "Bé"),
        said("user", "C?"),
        said("assistant", "D"),
    ]
    found = encoded(tmp_path, {"messages": messages})
    assert learned(found) == "Bé<|end|>D<|end|>"
    assert whole(found).startswith("<|system|>S<|end|><|user|><|assistant|>A?<|end|><|assistant|>B")


def test_only_the_completion_is_learned(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q: ", "completion": "A"},
        {"prompt": [said("user", "Q")], "completion": [said("assistant", "A")]},
        {"prompt": "", "completion": "AB<|end|>"},
    ]
    found = encoded(tmp_path, *rows)
    assert [learned(found, i) for i in range(3)] == ["A<|end|>", "A<|end|>", "AB<|end|>"]
    assert whole(found) == "Q: A<|end|>"


def test_text_is_learned_whole(tmp_path: Path) -> None:
    found = encoded(tmp_path, {"text": "abc"}, {"text": "a<|end|>"})
    assert [learned(found, i) for i in range(2)] == ["abc<|end|>", "a<|end|>"]
    assert found.total == 6
    assert found.length(found[0]) == 4


def test_long_rows_are_cut(tmp_path: Path) -> None:
    found = encoded(tmp_path, {"text": "a" * 50}, {"text": "b"}, max_length=8)
    assert [len(found[i]["input_ids"]) for i in range(2)] == [8, 2]
    assert found.truncated == 1


@pytest.mark.parametrize("text", ["a b ", "a", " ", "漢"])
def test_a_line_of_ten_megabytes(tmp_path: Path, text: str) -> None:
    many = 10_000_000 // len(text.encode())
    found = encoded(tmp_path, {"text": text * many}, max_length=64)
    short = encoded(tmp_path, {"text": text * 200}, max_length=64)
    assert found[0]["input_ids"].tolist() == short[0]["input_ids"].tolist()
    assert found.truncated == 1


def test_tokens_of_many_characters_are_found_too(tmp_path: Path) -> None:
    """Where a token is longer than the beginning that is looked at first, more is looked at."""
    text = "<|assistant|>" * 300
    found = encoded(tmp_path, {"text": text}, max_length=4)
    assert whole(found) == "<|assistant|>" * 4
    (longer,) = encoded(tmp_path, {"text": "x" * 9 + "<|assistant|>" * 90}, max_length=99).tokens
    assert len(longer) == 99


BAD: dict[str, tuple[Any, str]] = {
    "no column": ({"txt": "a"}, "has the columns ['txt']; expected messages, prompt and"),
    "no completion": ({"prompt": "a"}, "has the columns ['prompt']"),
    "empty text": ({"text": ""}, "no token after the first"),
    "empty completion": ({"prompt": "ab", "completion": ""}, "no token after the first"),
    "a number": ({"text": 7}, "text is a int; expected a string"),
    "null": ({"text": None}, "text is a NoneType"),
    "a list": ({"prompt": "a", "completion": ["b"]}, "completion is a list"),
    "half a pair": ({"text": "ab\ud800"}, "half of a surrogate pair at character 2"),
    "no messages": ({"messages": []}, "messages is an empty list"),
    "messages as text": ({"messages": "hi"}, "messages is a str"),
    "a message as text": ({"messages": ["hi"]}, "message 0 needs a role"),
    "no role": ({"messages": [{"content": "hi"}]}, "message 0 needs a role"),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, "message 0 needs"),
    "no assistant": ({"messages": [said("user", "a")]}, "the roles are ['user']"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_has_a_line_and_a_reason(tmp_path: Path, kind: str) -> None:
    row, why = BAD[kind]
    with pytest.raises(RowsError) as caught:
        encoded(tmp_path, {"text": "good"}, row, {"text": "good"})
    assert f"{tmp_path}/rows.jsonl, line 2: " in str(caught.value)
    assert why in str(caught.value)
    assert [fault.row for fault in caught.value.faults] == [1]


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match=r"line 3: (?s:.*)and 5 more rows") as caught:
        encoded(tmp_path, *[{"text": ""}] * 15)
    assert len(caught.value.faults) == 15


def test_a_cut_that_leaves_nothing_to_learn_says_so(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="within the first 8 tokens"):
        encoded(tmp_path, {"prompt": "a" * 50, "completion": "b"}, max_length=8)


def test_messages_beyond_the_cut_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the assistant's messages takes a run of the template over all before it."""
    messages = [said(("user", "assistant")[i % 2], f"message {i}") for i in range(2000)]
    calls = []
    template = TOKENIZER.apply_chat_template

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return template(*args, **options)

    monkeypatch.setattr(TOKENIZER, "apply_chat_template", counted)
    rows = {"messages": messages}, {"messages": messages[:20]}
    found = encoded(tmp_path, *rows, max_length=90)
    assert len(calls) < 40
    assert learned(found, 0) == learned(found, 1) != ""


def test_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "messages": [
            said("user", "a"),
            said("assistant", "b"),
            said("user", "c"),
            said("assistant", "d"),
        ]
    }
    monkeypatch.setattr(
        TOKENIZER, "chat_template", "{{ messages | length }}{{ messages[0].content }}"
    )
    with pytest.raises(RowsError, match="writes earlier messages anew"):
        encoded(tmp_path, row)
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowsError, match="does not take it: roles must alternate"):
        encoded(tmp_path, row)
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(gf.OptionError, match="has no chat template"):
        encoded(tmp_path, row)


def test_pieces_are_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"text": "aé漢b"}]))
    pieces = pieces_of(Rows.open(path), 0, TOKENIZER, 100)
    assert "".join(pieces) == "aé漢b<|end|>"
    assert len(pieces) == 1 + 2 + 3 + 1 + 1


# --- on the command line ----------------------------------------------------------------------

LINE = "score MODEL --pool pool.jsonl --target target.jsonl --top 3 --out sel.jsonl"


def test_a_bad_row_stops_before_anything_is_computed(run: Run, files: Path) -> None:
    with (files / "pool.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text"\n')
    code, told = run(LINE)
    assert code == 2
    assert "pool.jsonl, line 41: no token after the first" in told
    assert "pool.jsonl, line 42: no valid JSON" in told
    assert sorted(p.name for p in files.iterdir()) == ["pool.jsonl", "target.jsonl"]


def test_bad_rows_can_be_set_aside(run: Run, files: Path) -> None:
    good = (files / "pool.jsonl").read_text()
    assert run(LINE)[0] == 0
    before = [json.loads(line) for line in (files / "sel.jsonl").read_text().splitlines()]
    (files / "pool.jsonl").write_text('{"text"\n' + good + '{"text": ""}\n')
    code, told = run(LINE + " --bad-rows set-aside --report r.html --group source")
    assert code == 0, told
    aside = [json.loads(x) for x in (files / "sel.set-aside.jsonl").read_text().splitlines()]
    assert [(x["row"], x["where"]) for x in aside] == [
        (0, "pool.jsonl, line 1"),
        (41, "pool.jsonl, line 42"),
    ]
    after = [json.loads(line) for line in (files / "sel.jsonl").read_text().splitlines()]
    assert [row["messages"] for row in after] == [row["messages"] for row in before]
    assert [r["ghostfunc"]["row"] for r in after] == [r["ghostfunc"]["row"] + 1 for r in before]


def test_a_file_of_bad_rows_alone(run: Run, files: Path) -> None:
    (files / "pool.jsonl").write_text('{"text": ""}\n')
    code, told = run(LINE + " --bad-rows set-aside")
    assert code == 2
    assert "no row can be used" in told
