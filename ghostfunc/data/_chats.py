"""Rows to tokens: chats, prompts with completions, and plain text, labelled where it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ghostfunc._base.errors import OptionError
from ghostfunc.data._errors import Fault, RowsError
from ghostfunc.data._progress import progress_bar
from ghostfunc.data._rows import Rows

IGNORED = -100
RAISED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template, which is a program, may raise besides the errors of its own language."""

COLUMNS = "messages, prompt and completion, or text"


class Tokenizer(Protocol):
    """What is used of a fast Hugging Face tokenizer."""

    is_fast: bool
    chat_template: Any
    eos_token: str | None
    eos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, messages: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Encoded:
    """Samples of tokens, a map-style data set for `gf.score_dataset`.

    Attributes:
        tokens: ids of every sample.
        counted: which of them are labels.
        rows: the index of every sample's row.
        truncated: how many samples were longer than allowed.
    """

    tokens: Sequence[NDArray[np.int32]]
    counted: Sequence[NDArray[np.bool_]]
    rows: Sequence[int]
    truncated: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        ids = self.tokens[index].astype(np.int64)
        return {"input_ids": ids, "labels": np.where(self.counted[index], ids, IGNORED)}

    def length(self, sample: Mapping[str, NDArray[Any]]) -> int:
        """Tokens of a sample."""
        return len(sample["input_ids"])

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return sum(map(len, self.tokens))


def encode(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    faults: list[Fault] | None = None,
    progress: bool = False,
) -> Encoded:
    """Tokenize rows, and label what the model is to learn.

    - `messages`: a list of `{"role", "content"}`, by the tokenizer's chat template; the tokens of
      assistant messages are labels.
    - `prompt` and `completion`: strings, or lists of messages; the completion's tokens are labels.
    - `text`: all tokens are labels.

    Completions and texts end with the end-of-sequence token.

    Args:
        rows: of a file.
        tokenizer: a fast Hugging Face tokenizer (offsets of tokens are needed).
        max_length: tokens of a sample; longer ones are cut at the end.
        faults: rows that cannot be used are appended to it, and left out. By default they are
            raised, all together.
        progress: show a bar (needs tqdm).

    Raises:
        OptionError: the tokenizer is a slow one, or `max_length` is less than 2.
        RowsError: rows that cannot be used, and why.
    """
    if not tokenizer.is_fast:
        raise OptionError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell where tokens are "
            "in a text. Load it by AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    if max_length < 2:
        raise OptionError(f"max_length={max_length}: a sample needs at least 2 tokens.")
    found: list[Fault] = []
    tokens, counted, kept, truncated = [], [], [], 0
    with progress_bar(len(rows), "reading", shown=progress) as bar:
        for row in range(len(rows)):
            bar.advance(1, 0)
            try:
                ids, labelled = _tokens(rows, row, tokenizer, max_length)
                if not labelled[1:max_length].any():
                    raise rows.fault(row, _nothing_to_learn(len(ids), max_length))
            except RowsError as error:
                found += error.faults
                continue
            truncated += len(ids) > max_length
            tokens.append(ids[:max_length])
            counted.append(labelled[:max_length])
            kept.append(row)
    if faults is not None:
        faults += found
    elif found:
        raise RowsError(found)
    return Encoded(tokens, counted, kept, truncated)


def _nothing_to_learn(count: int, max_length: int) -> str:
    cut = f" within the first {max_length} tokens" if count > max_length else ""
    return (
        f"no token after the first is to be learned{cut}: the text, the completion or the "
        "assistant's messages are empty or too short, so the sample has no loss."
    )


def _tokens(
    rows: Rows, row: int, tokenizer: Tokenizer, max_length: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    text, spans, special = _render(rows, row, tokenizer)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise rows.fault(row, f"half of a surrogate pair at character {error.start}.") from error
    ids, offsets = _tokenized(text, tokenizer, max_length, special=special)
    labelled = np.zeros(len(offsets), dtype=np.bool_)
    last = int(offsets[:max_length, 1].max(initial=0))
    for start, end in spans:
        if start >= last:
            break
        # A token counts where it begins; those without text (special ones) do not.
        labelled |= (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return ids, labelled


def _tokenized(
    text: str, tokenizer: Tokenizer, max_length: int, *, special: bool
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids and offsets of a text's tokens, at least those that are kept.

    Of a text of many megabytes the beginning is enough: twice the tokens that are kept, so that the
    place of the cut does not reach those.
    """
    most = 32 * max_length
    while True:
        out = tokenizer(
            text[:most],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        ids = np.array(out["input_ids"], dtype=np.int32)
        if most >= len(text) or len(ids) >= 2 * max_length:
            return ids, np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        most *= 4


Rendered = tuple[str, Iterable[tuple[int, int]], bool]


def _render(rows: Rows, row: int, tokenizer: Tokenizer) -> Rendered:
    """The text, the spans of characters that count, and whether special tokens are to be added."""
    found = rows[row]
    if "messages" in found:
        return _chat(rows, row, found["messages"], tokenizer)
    if "prompt" in found and "completion" in found:
        prompt, completion = found["prompt"], found["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat(rows, row, [*prompt, *completion], tokenizer)
        _need_string(rows, row, "prompt", prompt)
        _need_string(rows, row, "completion", completion)
        text = _ended(prompt + completion, tokenizer) if completion else prompt
        return text, [(len(prompt), len(text))], True
    if "text" in found:
        _need_string(rows, row, "text", found["text"])
        text = _ended(found["text"], tokenizer) if found["text"] else ""
        return text, [(0, len(text))], True
    raise rows.fault(row, f"has the columns {sorted(found)}; expected {COLUMNS}.")


def _ended(text: str, tokenizer: Tokenizer) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _need_string(rows: Rows, row: int, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise rows.fault(row, f"{name} is a {type(value).__name__}; expected a string.")


def _chat(rows: Rows, row: int, messages: object, tokenizer: Tokenizer) -> Rendered:
    """A chat by its template; what the template writes for an assistant's message counts."""
    _check_messages(rows, row, messages)
    assert isinstance(messages, list)  # checked above, for mypy
    if tokenizer.chat_template is None:
        raise OptionError(
            "the tokenizer has no chat template, and rows have messages. Add one to the model's "
            "folder (chat_template.jinja), or give prompt and completion, or text."
        )
    whole = _templated(rows, row, messages, tokenizer, answer=False)
    return whole, _said(rows, row, messages, tokenizer, whole), False


def _said(
    rows: Rows, row: int, messages: list[Any], tokenizer: Tokenizer, whole: str
) -> Iterator[tuple[int, int]]:
    """Where the assistant's messages are within the whole, one after the other: each needs a run of
    the template over all before it, and those beyond a cut are never asked for."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(rows, row, messages[:i], tokenizer, answer=True) if i else ""
        after = _templated(rows, row, messages[: i + 1], tokenizer, answer=False)
        if not whole.startswith(after) or not after.startswith(before):
            raise rows.fault(
                row,
                f"message {i}: the chat template writes earlier messages anew when later ones "
                "follow, so it cannot be told what the assistant said. Give prompt and completion.",
            )
        yield len(before), len(after)


def _templated(
    rows: Rows, row: int, messages: list[Any], tokenizer: Tokenizer, *, answer: bool
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, *RAISED) as error:
        raise rows.fault(row, f"the chat template does not take it: {error}.") from error
    return str(text)


def _check_messages(rows: Rows, row: int, messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else f"a {type(messages).__name__}"
        raise rows.fault(row, f"messages is {kind}; expected a list of role and content.")
    for i, message in enumerate(messages):
        good = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not good:
            raise rows.fault(row, f"message {i} needs a role and a content, both strings.")
    if not any(m["role"] == "assistant" for m in messages):
        roles = list(dict.fromkeys(m["role"] for m in messages))
        raise rows.fault(row, f"no message is the assistant's; the roles are {roles}.")


def pieces_of(rows: Rows, row: int, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """The text of every token of a sample, in order."""
    text, _, special = _render(rows, row, tokenizer)
    offsets = _tokenized(text, tokenizer, max_length, special=special)[1]
    return list(_pieces(text, offsets[:max_length].tolist()))


def _pieces(text: str, offsets: Sequence[Sequence[int]]) -> Iterator[str]:
    end = 0
    for start, stop in offsets:
        # Bytes of one character may be several tokens: the first shows it.
        yield text[max(start, end) : stop] if stop > end else ""
        end = max(end, stop)
