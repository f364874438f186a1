"""`ghostfunc score` from files to files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ghostfunc as gf
from ghostfunc.cli import _score as score_command
from ghostfunc.data import Rows, _score as score_module, batches, encode, padded, write_rows

from .conftest import chat, lines

Run = Callable[..., tuple[int, str]]
LINE = "score MODEL --pool pool.jsonl --target target.jsonl --top 7 --out sel.jsonl"


def test_the_newcomers_command(run: Run, files: Path) -> None:
    code, said = run(LINE + " --report r.html --scores s.parquet")
    assert code == 0, said
    chosen = [json.loads(line) for line in (files / "sel.jsonl").read_text().splitlines()]
    pool = [json.loads(line) for line in (files / "pool.jsonl").read_text().splitlines()]
    assert len(chosen) == 7
    for rank, row in enumerate(chosen, 1):
        added = row.pop("ghostfunc")
        assert added["rank"] == rank
        assert pool[added["row"]] == row
    table = pq.read_table(files / "s.parquet")
    assert table.column_names == ["id", "dot_higher_helps", "loss"]
    assert table["id"].to_pylist() == list(range(40))
    assert json.loads(table.schema.metadata[b"ghostfunc"])["target_rows"] == 3
    assert (files / "r.html").stat().st_size > 10_000
    assert not (files / "sel.run").exists()
    assert "7 of 40 rows written to sel.jsonl" in said
    assert "tokens/s" in said


def test_ten_lines_of_python_give_the_same_file(run: Run, files: Path, model: Path) -> None:
    assert run(LINE)[0] == 0
    lm = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    model_fn, params = gf.hf.causal_lm(lm)
    rows = Rows.open("pool.jsonl")
    pool = encode(rows, tokenizer, max_length=96)
    target = encode(Rows.open("target.jsonl"), tokenizer, max_length=96)
    how: Any = {"collate": padded(tokenizer.eos_token_id, max_length=96), "length": pool.length}
    scores = gf.score_dataset(model_fn, params, pool, val=batches(target, **how), **how)
    write_rows("python.jsonl", rows, scores.top(7))
    assert (files / "python.jsonl").read_bytes() == (files / "sel.jsonl").read_bytes()


def test_scores_are_those_of_single_calls(run: Run, files: Path, model: Path) -> None:
    """The numbers of the file, held against gradients by definition of samples by hand."""
    assert run(LINE + " --score cosine --scores s.parquet --dtype float64")[0] == 0
    found = torch.tensor(pq.read_table(files / "s.parquet")["cosine_higher_helps"].to_pylist())
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    model_fn, params = gf.hf.causal_lm(lm)

    def gradient(row: dict[str, Any]) -> torch.Tensor:
        question, answer = (message["content"] for message in row["messages"])
        before = tokenizer(f"<|user|>{question}<|end|><|assistant|>")["input_ids"]
        after = tokenizer(f"{answer}<|end|>")["input_ids"]
        batch = {
            "input_ids": torch.tensor([before + after]),
            "labels": torch.tensor([[-100] * len(before) + after]),
        }
        grads = gf.per_sample_grads(model_fn, params, batch)
        return torch.cat([g.flatten() for g in grads.values()])

    u = torch.stack([gradient(row) for row in Rows.open("target.jsonl")]).mean(0)
    for i in (0, 1, 17, 38):
        g = gradient(Rows.open("pool.jsonl")[i])
        expected = torch.nn.functional.cosine_similarity(g, u, dim=0)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-6, atol=1e-9)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_killed_run_goes_on_and_gives_the_same_bits(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(score_module, "PART", 8)
    assert run(LINE)[0] == 0
    whole = (files / "sel.jsonl").read_bytes()
    (files / "sel.jsonl").unlink()
    part, left = score_module._part, [after]

    def dying(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return part(*args)

    monkeypatch.setattr(score_module, "_part", dying)
    code, said = run(LINE)
    assert code == 130
    assert "--resume" in said
    assert not (files / "sel.jsonl").exists()
    monkeypatch.setattr(score_module, "_part", part)
    code, said = run(LINE)
    assert code == 2
    assert "sel.run holds a run that was stopped. Add --resume" in said
    assert run(LINE + " --resume")[0] == 0
    assert (files / "sel.jsonl").read_bytes() == whole


def test_another_pool_is_not_resumed(run: Run, files: Path, monkeypatch: Any) -> None:
    def dying(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score_module, "_part", dying)
        assert run(LINE)[0] == 130
    with (files / "pool.jsonl").open("a") as file:
        file.write('{"text": "one more row"}\n')
    code, said = run(LINE + " --resume")
    assert code == 2
    assert "pool" in said
    assert "holds another run" in said


def test_dry_run_writes_nothing(run: Run, files: Path) -> None:
    before = sorted(files.iterdir())
    code, said = run(LINE + " --dry-run")
    assert code == 0
    for word in ("40 rows", "parameters that count", "tokens", "time", "would write"):
        assert word in said
    assert sorted(files.iterdir()) == before


def test_verify_goes_first(run: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run(LINE + " --verify 2")
    assert code == 0
    assert "exact to a tolerance" in said
    (files / "sel.jsonl").unlink()
    monkeypatch.setattr(gf.Report, "ok", False)
    code, said = run(LINE + " --verify 2")
    assert code == 3
    assert not (files / "sel.jsonl").exists()


def test_a_config_replays_a_run(run: Run, files: Path) -> None:
    assert run(LINE + " --score cosine --max-length 40")[0] == 0
    first = (files / "sel.jsonl").read_bytes()
    (files / "sel.jsonl").unlink()
    code, said = run("score --config sel.config.json")
    assert code == 0, said
    assert (files / "sel.jsonl").read_bytes() == first
    assert run("score --config sel.config.json --top 2 --out two.jsonl")[0] == 0
    assert (files / "two.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "--config bad.json"),
        ("[]", "expected an object"),
        ('{"nothing": 1}', "there is no option ['nothing']"),
        ('{"model": "m"}', "are missing"),
        ('{"model": "m", "pool": "p", "target": "t", "out": "o", "top": "x"}', "'x' is no int"),
    ],
)
def test_bad_configs(run: Run, files: Path, content: str, said: str) -> None:
    (files / "bad.json").write_text(content)
    code, found = run("score --config bad.json")
    assert code == 2
    assert said in found


def test_the_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"ghostfunc {gf.__version__}\n")


def test_parameters_can_be_chosen(run: Run, files: Path) -> None:
    code, said = run(LINE + " --parameters h\\.0\\.mlp --dry-run")
    assert code == 0, said
    assert "552 parameters that count" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--out sel.txt", "ends with .jsonl"),
        ("--out pool.jsonl", "is one of the inputs"),
        ("--group nothing --report r.html", "--group nothing: no row of pool.jsonl has such"),
        ("--heat -1", "--heat -1: expected a number of samples"),
        ("--heat 2", "--heat 2 says what the page shows, and there is none"),
        ("--group source", "--group source says what the page shows, and there is none"),
        ("--image picture", "--image picture says what the page shows, and there is none"),
        ("--heat 2 --score cosine --report r.html", "a cosine is no sum over tokens"),
        ("--out pool.jsonl/x.jsonl", "is no folder"),
        ("--report r.pdf", "ends with .html"),
        ("--scores s.csv", "ends with .parquet"),
        ("--top 0", "at least 1"),
        ("--top 41", "has 40 rows to choose from"),
        ("--verify -1", "expected a number of rows"),
        ("--resume", "there is no stopped run"),
        ("--pool nothing.jsonl", "there is no such file"),
        ("--pool MODEL", "without state.json"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device tpus", "--device tpus"),
        ("--parameters (", "is no regular expression"),
        ("--parameters nothing", "matches none of"),
        ("--max-length 1", "at least 2 tokens"),
        ("--score dots", "dots"),
        ("--dtype int8", "int8"),
        ("--token-budget 0", "token_budget=0"),
        ("--nonsense", "nonsense"),
        ("--config", "--config needs"),
    ],
)
def test_wrong_options(run: Run, files: Path, more: str, said: str) -> None:
    code, found = run(f"{LINE} {more}")
    assert code == 2
    assert said in found
    assert "Traceback" not in found
    assert not (files / "sel.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such folder"),
        ({}, "config.json"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": "[]"}, "expected a JSON object"),
        ({"config.json": '{"model_type": "vit"}'}, "cannot load a causal language model"),
        ({"adapter_config.json": "{}"}, "holds an adapter"),
    ],
)
def test_folders_that_are_no_model(run: Run, files: Path, content: Any, said: str) -> None:
    if content is not None:
        (files / "m").mkdir()
        for name, text in content.items():
            (files / "m" / name).write_text(text)
    code, found = run(LINE.replace("MODEL", "m"))
    assert code == 2
    assert said in found
    assert "Traceback" not in found


def test_help_names_every_command(run: Run) -> None:
    code, said = run("--help")
    assert code == 0
    for name in ("score", "select", "report", "verify", "explain", "project", "query"):
        assert name in said


def test_weights_that_are_not_there_are_no_random_numbers(
    run: Run, files: Path, model: Path
) -> None:
    shutil.copytree(model, files / "m")
    weights = files / "m" / "model.safetensors"
    kept = {name: x for name, x in load_file(weights).items() if ".mlp." not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    code, said = run(LINE.replace("MODEL", "m"))
    assert code == 2
    assert "has no weights for 4 parameters of its model" in said
    weights.write_bytes(weights.read_bytes()[:1000])
    code, said = run(LINE.replace("MODEL", "m"))
    assert code == 2
    assert "transformers cannot load" in said


@pytest.mark.parametrize("line", [LINE, "verify MODEL --pool pool.jsonl"])
def test_another_models_tokenizer(run: Run, files: Path, model: Path, line: str) -> None:
    shutil.copytree(model, files / "m")
    lm = transformers.AutoModelForCausalLM.from_pretrained(model)
    lm.resize_token_embeddings(50)
    lm.save_pretrained(files / "m")
    code, said = run(line.replace("MODEL", "m"))
    assert code == 2
    assert "pool.jsonl, line 1: the tokenizer makes the token" in said
    assert "the model knows 50" in said


def test_rows_that_change_under_way_are_not_taken_for_those_that_were_scored(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = score_command.score_dataset

    def changing(*args: Any, **options: Any) -> Any:
        scores = scored(*args, **options)
        lines = (files / "pool.jsonl").read_text().splitlines(keepends=True)
        (files / "pool.jsonl").write_text("".join(reversed(lines)))
        return scores

    monkeypatch.setattr(score_command, "score_dataset", changing)
    code, said = run(LINE)
    assert code == 2
    assert "the file has changed since it was opened" in said
    assert not (files / "sel.jsonl").exists()


def test_rows_of_the_target_in_the_pool_are_told(run: Run, files: Path) -> None:
    shutil.copy(files / "pool.jsonl", files / "target.jsonl")
    code, said = run(LINE)
    assert code == 0
    assert "note: 40 rows of pool.jsonl are rows of target.jsonl too" in said


@pytest.mark.parametrize("command", ["select", "report"])
def test_scores_of_other_rows_are_refused(run: Run, files: Path, command: str) -> None:
    assert run(LINE + " --scores s.parquet")[0] == 0
    (files / "other.jsonl").write_text(lines(chat(i) for i in range(1, 41)))
    end = {"select": "--top 3 --out x.jsonl", "report": "--out x.html"}[command]
    code, said = run(f"{command} s.parquet --pool other.jsonl {end}")
    assert code == 2
    assert "other.jsonl does not hold the rows that were scored" in said


@pytest.mark.parametrize(
    ("added", "more", "said"),
    [
        ({"ghostfunc": {}}, "", "pool.jsonl, line 40 has a key 'ghostfunc' already"),
        ({"image": "no.png"}, "--report r.html --image image", "pool.jsonl, line 40: the image"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_beginning(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, added: Any, more: str, said: str
) -> None:
    monkeypatch.setattr(score_command, "score_dataset", None)
    last = {**chat(39), **added}
    (files / "pool.jsonl").write_text(lines([*(chat(i) for i in range(39)), last]))
    code, found = run(f"{LINE} {more}")
    assert code == 2
    assert said in found
    assert not (files / "sel.run").exists()
