"""select, report, verify, explain, project, query."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import ghostfunc as gf
from ghostfunc.cli import _ask
from ghostfunc.data import Rows, batches, encode, padded
from ghostfunc.hf._state import STATE_FILE, Saved, save_state
from ghostfunc.hf._table import write_table

from .conftest import chat, lines

Run = Callable[..., tuple[int, str]]
LINE = "score MODEL --pool pool.jsonl --target target.jsonl --top 7 --out sel.jsonl"


def rows_of(path: Path) -> list[int]:
    return [json.loads(line)["ghostfunc"]["row"] for line in path.read_text().splitlines()]


def test_select_chooses_as_score_does(run: Run, files: Path) -> None:
    assert run(LINE + " --scores s.parquet")[0] == 0
    code, said = run("select s.parquet --pool pool.jsonl --top 7 --out again.jsonl")
    assert code == 0, said
    assert (files / "again.jsonl").read_bytes() == (files / "sel.jsonl").read_bytes()
    run("select s.parquet --pool pool.jsonl --top 40 --lowest --out low.jsonl")
    assert rows_of(files / "low.jsonl")[-7:][::-1] == rows_of(files / "sel.jsonl")
    run("select s.parquet --pool pool.jsonl --top 1 --by loss --out loss.jsonl")
    (row,) = (files / "loss.jsonl").read_text().splitlines()
    losses = json.loads(row)["ghostfunc"]["loss"]
    code, said = run("select s.parquet --pool pool.jsonl --top 41 --out x.jsonl")
    assert (code, losses > 0) == (2, True)
    assert "between 1 and all 40" in said


def test_what_is_read_is_never_written_over(run: Run, files: Path) -> None:
    """Every file that a command writes, against every file that it reads."""
    assert run(LINE + " --scores s.parquet")[0] == 0
    pq.write_table(pa.Table.from_pylist([chat(i) for i in range(40)]), files / "pool.parquet")
    (files / "sel.set-aside.jsonl").write_text((files / "pool.jsonl").read_text())
    (files / "link.jsonl").symlink_to("pool.jsonl")
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    score = "score MODEL --target target.jsonl --top 3 --out sel.jsonl --pool"
    for line in (
        f"{score} sel.jsonl",
        f"{score} pool.parquet --scores pool.parquet",
        f"{score} sel.set-aside.jsonl",
        "select s.parquet --pool pool.jsonl --top 3 --out pool.jsonl",
        "select s.parquet --pool pool.jsonl --top 3 --out link.jsonl",
        "query MODEL --store s --pool pool.jsonl --target target.jsonl --out target.jsonl",
    ):
        code, said = run(line)
        assert code == 2, line
        assert "is one of the inputs; it would be lost" in said
    assert before == {path: path.read_bytes() for path in before}


def test_report(run: Run, files: Path) -> None:
    assert run(LINE + " --scores s.parquet")[0] == 0
    code, said = run("report s.parquet --pool pool.jsonl --out r.html --group source")
    assert code == 0, said
    assert "Question 3?" in (files / "r.html").read_text()
    code, said = run("report s.parquet --pool pool.jsonl --out r.html --group nothing")
    assert code == 2
    assert "no row has a column 'nothing'" in said


def test_the_trainers_files_get_the_sign_of_scores(run: Run, files: Path) -> None:
    """GhostTrainer says by how much a sample changed the loss: negative helps."""
    values = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    scores = gf.shapley.Scores(torch.arange(40), values, torch.full((40,), 3))
    write_table(scores, ["dev"], {"run": "tiny"}, files / "trainer.parquet")
    code, said = run("select trainer.parquet --pool pool.jsonl --top 2 --out t.jsonl")
    assert code == 0, said
    first = json.loads((files / "t.jsonl").read_text().splitlines()[0])["ghostfunc"]
    assert first == {"rank": 1, "row": 0, "steps": 3, "shapley_higher_helps/dev": 1}
    assert run("report trainer.parquet --pool pool.jsonl --out t.html")[0] == 0


def page_data(path: Path) -> dict[str, Any]:
    """What a page shows."""
    text = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return dict(json.loads(text))


def run_folder(folder: Path) -> None:
    """A run of 40 samples as GhostTrainer leaves it: at step 10 half of them were met once, at 20
    all, at 30 the second half again. The even ones are sums, the others songs."""
    value = torch.where(torch.arange(40) % 2 == 0, -0.5, 0.25).double()
    met = [torch.arange(40) < 20, torch.arange(40) >= 0, torch.arange(40) >= 20]
    values, counts = torch.zeros(40).double(), torch.zeros(40, dtype=torch.long)
    for step, now in zip((10, 20, 30), met, strict=True):
        new = now & (counts < (2 if step == 30 else 1))
        values, counts = values + value * new / step, counts + new
        seen = counts > 0
        state = gf.shapley.init(1)
        state = {
            **state,
            "ids": torch.arange(40)[seen],
            "values": values[seen][:, None],
            "counts": counts[seen],
        }
        saved = Saved(state, {}, {})
        if step == 30:
            scores = gf.shapley.Scores(torch.arange(40), values[:, None], counts)
            write_table(scores, ["dev"], {"global_step": 30}, folder / "scores.parquet")
        else:
            (folder / f"checkpoint-{step}").mkdir(parents=True)
            save_state(saved, folder / f"checkpoint-{step}" / STATE_FILE)


def test_a_run_over_training_time(run: Run, files: Path) -> None:
    run_folder(files / "run")
    code, said = run("report run --pool pool.jsonl --out r.html --group source")
    assert code == 0, said
    found = page_data(files / "r.html")["timeline"]
    assert found["steps"] == [10, 20, 30]
    lines = {line["name"]: line["values"] for line in found["lines"]}
    expected = {"sums": [0.05, 0.025, 0.5 / 30], "songs": [-0.025, -0.0125, -0.25 / 30]}
    assert lines.keys() == expected.keys()
    for name, values in expected.items():
        assert lines[name] == pytest.approx(values, rel=1e-4)
    assert run("report run --pool pool.jsonl --out r.html")[0] == 0
    (line,) = page_data(files / "r.html")["timeline"]["lines"]
    assert line["name"] == "all samples"
    shutil.rmtree(files / "run" / "checkpoint-10")
    shutil.rmtree(files / "run" / "checkpoint-20")
    assert run("report run --pool pool.jsonl --out r.html")[0] == 0
    assert "timeline" not in page_data(files / "r.html")


def test_checkpoints_of_another_run(run: Run, files: Path) -> None:
    run_folder(files / "run")
    path = files / "run" / "checkpoint-10" / STATE_FILE
    shutil.copy(path, files / "run" / "checkpoint-20" / STATE_FILE)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, said = run("report run --pool pool.jsonl --out r.html")
    assert code == 2
    assert "its checksum is not" in said
    scores = gf.shapley.Scores(
        torch.arange(40), torch.zeros(40, 1).double(), torch.zeros(40, dtype=torch.long)
    )
    path.unlink()
    write_table(scores, ["dev"], {"global_step": 30}, files / "run" / "scores.parquet")
    code, said = run("report run --pool pool.jsonl --out r.html")
    assert code == 2
    assert "belongs to another run" in said
    (files / "empty").mkdir()
    code, said = run("report empty --pool pool.jsonl --out r.html")
    assert code == 2
    assert "there is no such file" in said


def test_images_come_from_a_column(run: Run, files: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 40), "teal").save(files / "teal.png")
    rows = [{**chat(i), "picture": "teal.png"} for i in range(40)]
    (files / "pool.jsonl").write_text(lines(rows))
    code, said = run(LINE + " --scores s.parquet --report r.html --image picture")
    assert code == 0, said
    assert len(page_data(files / "r.html")["images"]) == 40
    assert run("report s.parquet --pool pool.jsonl --out r.html --image picture")[0] == 0
    code, said = run("report s.parquet --pool pool.jsonl --out r.html --image photo")
    assert code == 2
    assert "no row has a column 'photo'" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("select no.parquet --pool pool.jsonl --out x.jsonl", "no.parquet: there is no such file"),
        ("report . --pool pool.jsonl --out r.html", "scores.parquet: there is no such file"),
        ("select pool.jsonl --pool pool.jsonl --out x.jsonl", "no readable Parquet"),
        ("select s.parquet --pool target.jsonl --out x.jsonl", "has the id 3"),
        ("select s.parquet --pool pool.jsonl --by no --out x.jsonl --top 2", "no column 'no'"),
        ("verify MODEL --pool pool.jsonl --count 0", "--count 0: expected at least 1"),
        ("explain MODEL --pool pool.jsonl --count -1", "--count -1: expected at least 1"),
        ("project MODEL --pool pool.jsonl --store s --columns 1", "--columns 1: expected at least"),
        (
            "project MODEL --pool pool.jsonl --store s --columns 100000000000",
            "--columns 100,000,000,000: expected at most",
        ),
        ("project MODEL --pool pool.jsonl --store s --batch-size 0", "--batch-size 0: expected"),
        ("query MODEL --store no --pool pool.jsonl --target target.jsonl --out x.jsonl", "no such"),
    ],
)
def test_wrong_files(run: Run, files: Path, line: str, said: str) -> None:
    if "s.parquet" in line:
        assert run(LINE + " --scores s.parquet")[0] == 0
    code, found = run(line)
    assert code == 2
    assert said in found


def test_verify(run: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run("verify MODEL --pool pool.jsonl --count 3")
    assert code == 0
    assert "exact to a tolerance" in said
    assert "materialized by" in said
    monkeypatch.setattr(gf.Report, "ok", False)
    assert run("verify MODEL --pool pool.jsonl")[0] == 3


def test_explain(run: Run, files: Path) -> None:
    code, said = run("explain MODEL --pool pool.jsonl --count 3")
    assert code == 0
    assert "transformer.wte.weight" in said
    assert "forming every g_i" in said


def test_a_projected_pool_finds_what_the_gradients_find(run: Run, files: Path, model: Path) -> None:
    pytest.importorskip("zarr")
    make = "project MODEL --pool pool.jsonl --store store --columns 512"
    code, said = run(make)
    assert code == 0, said
    assert "40 rows projected to 512 numbers" in said
    assert "0 rows projected" in run(make)[1]
    ask = "query MODEL --store store --pool pool.jsonl --target target.jsonl --top 40 --out q.jsonl"
    code, said = run(ask + " --report q.html --group source")
    assert code == 0, said
    page = page_data(files / "q.html")
    assert (page["ranking"], len(page["ids"])) == ("cosine_higher_helps", 40)
    assert page["facts"]["store"] == "store"
    lm = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    model_fn, params = gf.hf.causal_lm(lm)
    pool, target = (
        encode(Rows.open(f"{name}.jsonl"), tokenizer, max_length=96) for name in ("pool", "target")
    )
    how = {"collate": padded(0), "length": pool.length}
    exact = gf.score_dataset(
        model_fn, params, pool, val=batches(target, **how), quantities=("cosine",), **how
    )["cosine_higher_helps"]
    found = {
        row["ghostfunc"]["row"]: row["ghostfunc"]["cosine_higher_helps"]
        for row in map(json.loads, (files / "q.jsonl").read_text().splitlines())
    }
    both = torch.stack([exact, torch.tensor([found[i] for i in range(40)])])
    assert torch.corrcoef(both)[0, 1] > 0.95
    (files / "pool.jsonl").write_text('{"text": "other"}\n')
    code, said = run(ask)
    assert code == 2
    assert "was not made of the rows" in said
    code, said = run(make)
    assert code == 2
    assert "made of other rows" in said
    assert _ask.CHECKPOINT in repr(list((files / "store").rglob("*")))


def test_a_gguf_file_is_a_model(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """transformers is told which file of the folder it is, and what it makes is scored."""
    made = files / "m.gguf"
    line = f"explain {made} --pool pool.jsonl --count 2"
    assert "there is no such file" in run(line)[1]
    made.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in run(line)[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    asked: list[Path] = []

    def reads(kind: Any) -> None:
        from_folder = kind.from_pretrained

        def read(*, pretrained_model_name_or_path: Path, gguf_file: str, **more: Any) -> Any:
            asked.append(pretrained_model_name_or_path / gguf_file)
            return from_folder(model, **more)

        monkeypatch.setattr(kind, "from_pretrained", read)

    reads(transformers.AutoTokenizer)
    reads(transformers.AutoModelForCausalLM)
    code, said = run(line)
    assert code == 0, said
    assert asked == [made, made]
