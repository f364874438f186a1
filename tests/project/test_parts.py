"""What a run is made of: options, files, batches, and the page about it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import DOMAINS, make_config, run_alone, write_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import ghostfunc as gf
from examples import strict_cli
from examples.graddotprod_lm import data, llava, models as gpt2, prepare_data, report, scores, train
from examples.graddotprod_lm.config import Config, check_dtype
from examples.graddotprod_lm.evaluate import estimate_loss
from examples.graddotprod_lm.step import make_step
from examples.graddotprod_lm.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def options(config: Config) -> list[str]:
    return [x for f in fields(config) for x in (f"--{f.name}", str(vars(config)[f.name]))]


# --- options ----------------------------------------------------------------------------------


def test_a_full_command_line_is_the_configuration(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "out")
    assert strict_cli.parse(Config, None, options(config)) == config


REQUIRED = [f.name for f in fields(Config) if not f.metadata.get("optional")]


@pytest.mark.parametrize("name", REQUIRED)
def test_every_option_is_required(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = options(make_config(tmp_path, tmp_path))
    at = args.index(f"--{name}")
    with pytest.raises(SystemExit) as stopped:
        strict_cli.parse(Config, None, args[:at] + args[at + 2 :])
    assert stopped.value.code == 2
    assert f"--{name}" in capsys.readouterr().err


def test_all_missing_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        strict_cli.parse(Config, None, ["--seed", "0"])
    said = capsys.readouterr().err
    assert all(f"--{name} " in said for name in REQUIRED if name != "seed")
    assert set(REQUIRED) == {f.name for f in fields(Config)} - {"compile"}


def test_options_are_not_shortened(tmp_path: Path) -> None:
    args = options(make_config(tmp_path, tmp_path))
    args[args.index("--method")] = "--meth"
    with pytest.raises(SystemExit):
        strict_cli.parse(Config, None, args)


def test_defaults_are_refused() -> None:
    @dataclass(frozen=True)
    class Lax:
        seed: int = 0

    with pytest.raises(TypeError, match=r"no defaults.*seed"):
        strict_cli.parse(Lax, None, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "InRun"}, "--method InRun is unknown.*GradDotProd.*Regular"),
        ({"architecture": "GPT3"}, "--architecture GPT3 is unknown.*GPT2-Small"),
        ({"dtype": "float16"}, "--dtype float16 is unknown.*bfloat16"),
        ({"batch_size": 0}, "--batch_size 0 has to be at least 1"),
        ({"learning_rate": float("nan")}, "--learning_rate nan"),
        ({"num_domains": 23}, "--num_domains 23 is more than the 22"),
    ],
)
def test_values_that_cannot_be_meant(change: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        train.main(make_config(tmp_path, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_bfloat16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"Tesla T4 does not. Use --dtype float32"):
        check_dtype("bfloat16", torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"not mps. Use --dtype float32"):
        check_dtype("bfloat16", torch.device("mps"))
    check_dtype("bfloat16", CPU)
    check_dtype("float32", torch.device("cuda"))


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="--batch_size 3 cannot be divided among 2 processes"):
        replace(ALONE, size=2).divide(3, "batch_size")


# --- token files ------------------------------------------------------------------------------


def test_names_of_files() -> None:
    names = [data.file_name(d) for d in ("Gutenberg (PG-19)", "PubMed Central", "a/b (c) d")]
    assert names == ["Gutenberg_PG-19", "PubMed_Central", "a-b_c_d"]
    assert data.token_path(Path("p"), "val", "Wikipedia (en)") == Path(
        "p/val/validation-Wikipedia_en.bin"
    )


def test_all_missing_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokens(tmp_path)
    gone = [
        data.token_path(tmp_path, "train", DOMAINS[1]),
        data.token_path(tmp_path, "test", DOMAINS[0]),
    ]
    for path in gone:
        path.unlink()

    def too_soon(*args: object) -> None:
        pytest.fail("the model was built")

    monkeypatch.setattr(train, "build_model", too_soon)
    with pytest.raises(FileNotFoundError, match="2 of 9 token files") as error:
        train.main(make_config(tmp_path, tmp_path / "out"))
    assert all(f"\n  {path.absolute()}\n" in str(error.value) for path in gone)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    split = data.Split(tmp_path, "train", DOMAINS, length=64, vocab_size=90)
    split.read(split.of_domain(0, 3), CPU)
    with pytest.raises(ValueError, match=r"train-Books3.bin has token \d+, beyond.* of 90"):
        split.read(split.of_domain(2, 3), CPU)


def test_samples_of_a_step_are_told_by_seed_and_step(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    split = data.Split(tmp_path, "train", DOMAINS, length=64, vocab_size=257)
    first, again, other = (split.draw(64, seed=0, step=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.sample, again.sample)
    assert (first.sample != other.sample).any()
    assert (first.sample < split.sizes[first.domain]).all()
    parts = [first.part(r, 4) for r in range(4)]
    np.testing.assert_array_equal(np.concatenate([p.sample for p in parts]), first.sample)


@pytest.mark.parametrize("architecture", ["GPT2-Small", "GPT2-Medium", "GPT2-Large", "GPT2-Tiny"])
def test_architectures(architecture: str) -> None:
    with torch.device("meta"):
        model = gpt2.build_model(architecture, seed=0)
    millions = {"GPT2-Small": 124, "GPT2-Medium": 354, "GPT2-Large": 774, "GPT2-Tiny": 0}
    assert sum(p.numel() for p in model.parameters()) // 1_000_000 == millions[architecture]
    ids = (model.config.bos_token_id, model.config.eos_token_id)
    assert all(0 <= i < model.config.vocab_size for i in ids)


# --- preparing them ---------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for domain in ("Prose (en)", "Code"):
        (folder / domain).mkdir(parents=True)
    paragraphs = [f"{i} " + "To be or not to be. " * (5 + i % 60) for i in range(150)]
    (folder / "Prose (en)" / "b.txt").write_text("\n\n".join(paragraphs))
    lines = [json.dumps({"text": f"def f{i}():\n    return {i}\n"}) for i in range(80)]
    (folder / "Code" / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "Code" / "c.jsonl").write_text("\n".join(lines[:7]))
    return folder


def prepare(texts: Path, pile: Path, **changes: object) -> prepare_data.Config:
    config = prepare_data.Config(texts, pile, tokenizer="bytes", held_out_one_in=5, seed=0)
    config = replace(config, **changes)  # type: ignore[arg-type]
    prepare_data.prepare(config)
    return config


def test_bytes(texts: Path, tmp_path: Path) -> None:
    pile = tmp_path / "pile"
    prepare(texts, pile)
    assert data.domains_of(pile, 2) == ["Code", "Prose (en)"]
    data.check_files(pile, ["Code", "Prose (en)"])
    found: list[bytes] = []
    for split in data.SPLITS:
        tokens = np.fromfile(data.token_path(pile, split, "Prose (en)"), data.TOKEN)
        documents = np.split(tokens, np.flatnonzero(tokens == 256) + 1)
        found += [bytes(d[:-1].tolist()) for d in documents if len(d)]
    text = (texts / "Prose (en)" / "b.txt").read_bytes()
    assert all(d in text for d in found)
    assert sum(map(len, found)) == len(text)
    counts = [
        int((np.fromfile(data.token_path(pile, s, "Code"), data.TOKEN) == 256).sum())
        for s in data.SPLITS
    ]
    assert sum(counts) == 87
    assert min(counts[1:]) >= 17


def test_a_tokenizer_file(texts: Path, tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(texts / "Prose (en)" / "b.txt")], trainer)
    path = tmp_path / "tokenizer.json"
    bpe.save(str(path))
    prepare(texts, tmp_path / "pile", tokenizer=str(path))
    tokens = np.fromfile(data.token_path(tmp_path / "pile", "val", "Code"), data.TOKEN)
    text = report.decoder(str(path))(tokens.tolist())
    assert re.fullmatch(r"(def f(\d+)\(\):\n    return \2\n<\|endoftext\|>)+", text)


@pytest.mark.parametrize("after", [1, 40, 100])
def test_an_interrupted_preparation_goes_on(
    after: int, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(texts, tmp_path / "whole")
    monkeypatch.setattr(prepare_data, "SAVE_EVERY", 500)
    left = after

    def tired(name: str) -> prepare_data.Encode:
        def encode(text: str) -> list[int]:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return [*text.encode(), 256]

        return encode

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "load_tokenizer", tired)
        with pytest.raises(KeyboardInterrupt):
            prepare(texts, tmp_path / "pile")
    with pytest.raises(FileNotFoundError):
        data.check_files(tmp_path / "pile", ["Code", "Prose (en)"])
    prepare(texts, tmp_path / "pile")
    for path in (tmp_path / "whole").rglob("*.bin"):
        ours = tmp_path / "pile" / path.relative_to(tmp_path / "whole")
        assert ours.read_bytes() == path.read_bytes()
    assert not list((tmp_path / "pile").rglob("*.partial"))


def test_preparing_refuses(texts: Path, tmp_path: Path) -> None:
    pile = tmp_path / "pile"
    with pytest.raises(FileNotFoundError, match="neither `bytes` nor a file"):
        prepare(texts, pile, tokenizer="gpt2")
    with pytest.raises(ValueError, match="at least 3"):
        prepare(texts, pile, held_out_one_in=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="one folder for each domain"):
        prepare(tmp_path / "empty", pile)
    prepare(texts, pile)
    with pytest.raises(ValueError, match="begun with other options"):
        prepare(texts, pile, seed=1)
    (texts / "Code" / "d.jsonl").write_text('{"text": "fine"}\n{"body": "?"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl, line at byte 17: expected a JSON object"):
        prepare(texts, tmp_path / "other")


# --- losses of all kinds of batches -----------------------------------------------------------


def test_estimate_loss_takes_tensors_tuples_and_dicts() -> None:
    model = gpt2.build_model("GPT2-Tiny", seed=0)
    ids = torch.randint(257, (4, 20))
    labels = ids.clone()
    labels[0, 3:] = -100
    mask = torch.ones_like(ids)
    # GPT-2 takes (input_ids, past_key_values, attention_mask) in this order.
    kinds = (ids, (ids, None, mask), {"input_ids": ids, "attention_mask": mask})
    losses = [estimate_loss(model, [(x, labels)], ALONE, dtype="float32") for x in kinds]
    assert losses[0] == losses[1] == losses[2]
    halves = [(ids[:1], labels[:1]), (ids[1:], labels[1:])]
    assert estimate_loss(model, halves, ALONE, dtype="float32") == pytest.approx(
        losses[0], rel=1e-6
    )
    half = estimate_loss(model, [(ids, labels)], ALONE, dtype="bfloat16")
    assert half == pytest.approx(losses[0], rel=1e-2)
    assert model.training
    with pytest.raises(TypeError, match="a tensor, a tuple or a dict"):
        estimate_loss(model, [("ids", labels)], ALONE, dtype="float32")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no label to predict"):
        estimate_loss(model, [], ALONE, dtype="float32")


def test_images_with_captions() -> None:
    """Dict batches with `pixel_values`; the example itself holds its scores against the oracle."""
    outcome = llava.train_and_score(steps=14)
    assert outcome.auroc > 0.5
    assert outcome.test_loss < 1.6  # 2.3 at first


# --- a run and the page about it --------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The quickstart: batches of 2, here in bfloat16."""
    pile, out = tmp_path_factory.mktemp("pile"), tmp_path_factory.mktemp("out")
    write_tokens(pile)
    config = make_config(pile, out, batch_size=2, max_steps=20, dtype="bfloat16", eval_interval=10)
    run_alone(config)
    return config


def test_everything_is_in_the_run_directory(ended: Config) -> None:
    assert [p.name for p in ended.results_dir.iterdir()] == [ended.run_dir.name]
    names = {p.name for p in ended.run_dir.iterdir()}
    assert names >= {"config.json", "results.json", "checkpoint.pt", "metrics.jsonl", "scores"}
    results = json.loads((ended.run_dir / "results.json").read_text())
    assert results["config"] == ended.as_json()
    assert results["val_loss"].keys() == results["test_loss"].keys() == set(DOMAINS)
    table = scores.load(ended.run_dir)
    assert len(table) == 2 * 20
    assert table.step.tolist() == [s for s in range(1, 21) for _ in range(2)]


def test_scores_are_dot_products(tmp_path: Path) -> None:
    """The first step's scores against materialized gradients, through everything a run adds."""
    write_tokens(tmp_path)
    config = make_config(tmp_path, tmp_path / "out", max_steps=1)
    run_alone(config)
    table = scores.load(config.run_dir)
    model_fn, params = gf.hf.causal_lm(gpt2.build_model("GPT2-Tiny", seed=0).double())
    batches = {}
    for name, n in (("train", config.batch_size), ("val", config.val_batch_size)):
        split = data.Split(tmp_path, name, DOMAINS, length=64, vocab_size=257)  # type: ignore[arg-type]
        batches[name] = {"input_ids": split.read(split.draw(n, seed=0, step=1), CPU)}
    truth = gf.ghost_dot_prod(
        model_fn, params, batches["train"], batches["val"], mode="materialized", vectorize=False
    )
    np.testing.assert_allclose(table.dot_prod, truth.numpy(), rtol=1e-4)


def test_a_compiled_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = gpt2.build_model("GPT2-Tiny", seed=0)
    ids = torch.randint(257, (6, 64))
    train, val = {"input_ids": ids[:4]}, {"input_ids": ids[4:]}
    plain, compiled = (
        make_step(model, "GradDotProd", "float32", ALONE, compiled=c)(train, val)
        for c in (False, True)
    )
    torch.testing.assert_close(compiled.dot_prods, plain.dot_prods, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.grads, plain.grads, rtol=1e-5, atol=1e-6)


def test_a_folder_of_another_run_is_refused(ended: Config) -> None:
    with pytest.raises(ValueError, match="--max_steps 20, now 30"):
        train.main(replace(ended, max_steps=30))


def test_the_page(ended: Config) -> None:
    path = report.write_report(report.Config(ended.run_dir, "bytes"))
    page = path.read_text("utf-8")
    assert (ended.run_dir / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert page.count("<article>") == 2 * report.SHOWN
    assert "data:image/png;base64," in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|<script""", page)
    assert all(domain in page for domain in DOMAINS)


def test_best_and_worst_are_sums_over_visits() -> None:
    table = scores.Table(
        step=np.array([1, 1, 2, 2]),
        domain=np.array([0, 1, 0, 1]),
        sample=np.array([5, 5, 5, 6]),
        loss=np.array([3.0, 4.0, 2.0, 5.0]),
        dot_prod=np.array([1.0, -4.0, 2.0, 1.0]),
        learning_rate=np.array([0.5, 0.5, 0.25, 0.25]),
    )
    best, worst, negative = report.ranked_samples(table, ["a", "b"], lambda d, k: f"{d}/{k}")
    assert best == [report.Sample("a", 5, 1.0, 2, 3.0, 2.0, "0/5")]
    assert worst == [report.Sample("b", 5, -2.0, 1, 4.0, 4.0, "1/5")]
    assert negative == pytest.approx(1 / 3)


def test_a_page_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the run has to end first"):
        report.write_report(report.Config(tmp_path, "bytes"))


def test_text_of_bytes() -> None:
    assert report.bytes_to_text([*b"a\xc3\xa9", 256, *b"b\xff"]) == "aé■b�"
    with pytest.raises(FileNotFoundError, match="neither `bytes`, `ids` nor a file"):
        report.decoder("gpt2")
    assert report.decoder("ids")([1, 2]) == "1 2"
