"""A model's folder and files of rows, all tiny."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ghostfunc.cli import main

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that writes every message by itself."""


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]}
    )
    fast.chat_template = TEMPLATE
    return fast


def save_model(folder: Path, **options: Any) -> Path:
    """A GPT-2 with random weights, and its tokenizer."""
    tokenizer = bytes_tokenizer()
    sizes = {"n_positions": 96, "n_embd": 8, "n_layer": 1, "n_head": 2, **options}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def chat(i: int) -> dict[str, Any]:
    kind = ("sums", "songs")[i % 2]
    answer = f"It is {i * 7 % 100}." if i % 2 == 0 else "la " * (1 + i % 9)
    return {
        "messages": [
            {"role": "user", "content": f"Question {i}?"},
            {"role": "assistant", "content": answer},
        ],
        "source": kind,
    }


def lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the working one, with `pool.jsonl` and `target.jsonl`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.jsonl").write_text(lines(chat(i) for i in range(40)))
    (tmp_path / "target.jsonl").write_text(lines(chat(i) for i in range(100, 106, 2)))
    return tmp_path


@pytest.fixture
def run(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command, MODEL being the model's folder: its exit code and what it said."""

    def call(line: str) -> tuple[int, str]:
        arguments = [str(model) if x == "MODEL" else x for x in line.split()]
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call
