"""`ghostfunc score --score influence`: the target's direction through an inverse curvature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers

import ghostfunc as gf
from ghostfunc.cli import _score as score_command
from ghostfunc.curvature import _passes
from ghostfunc.data import Rows, _score as score_module, batches, encode, padded, write_rows

Run = Callable[..., tuple[int, str]]
LINE = "score MODEL --pool pool.jsonl --target target.jsonl --top 7 --out sel.jsonl"
INFLUENCE = LINE + " --score influence --token-budget 150"


def loaded(folder: Path) -> tuple[Any, Any]:
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return lm, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("more", "options", "damping"),
    [
        ("", {}, {"damping": 0.1, "relative": True}),
        (
            " --curvature-rows 10 --draws 2 --seed 3 --damping 1e-4 --no-relative-damping",
            {"draws": 2, "seed": 3},
            {"damping": 1e-4},
        ),
        (
            " --fisher empirical --diagonal *.wpe.weight --max-side 64",
            {"fisher": "empirical", "diagonal": ["*.wpe.weight"], "max_side": 64},
            {"damping": 0.1, "relative": True},
        ),
    ],
)
def test_python_gives_the_same_file(
    run: Run, files: Path, model: Path, more: str, options: Any, damping: Any
) -> None:
    code, said = run(INFLUENCE + more)
    assert code == 0, said
    lm, tokenizer = loaded(model)
    model_fn, params = gf.hf.causal_lm(lm)
    rows = Rows.open("pool.jsonl")
    pool = encode(rows, tokenizer, max_length=96)
    target = encode(Rows.open("target.jsonl"), tokenizer, max_length=96)
    how: Any = {"collate": padded(tokenizer.eos_token_id, max_length=96), "length": pool.length}
    some = [pool[i] for i in range(0, 40, 4 if "10" in more else 1)]
    if options.get("fisher") != "empirical":
        options["likelihood"] = gf.hf.causal_lm_likelihood(lm)
    curvature = gf.curvature.ekfac(
        model_fn, params, list(batches(some, token_budget=150, **how)), **options
    )
    u = curvature.solve(gf.direction(model_fn, params, batches(target, **how)), **damping)
    scores = gf.score_dataset(model_fn, params, pool, direction=u, token_budget=150, **how)
    columns = {"influence_higher_helps": scores["dot_higher_helps"], "loss": scores["loss"]}
    write_rows("python.jsonl", rows, gf.Scores(scores.ids, columns).top(7))
    assert (files / "python.jsonl").read_bytes() == (files / "sel.jsonl").read_bytes()


def test_scores_are_those_of_influence_functions(run: Run, files: Path, model: Path) -> None:
    """`gf.influence`, with a curvature of the same batches, and another ranking than dot's."""
    line = INFLUENCE + " --dtype float64 --scores "
    assert run(line + "s.parquet")[0] == 0
    assert run(line.replace("influence", "dot") + "dots.parquet")[0] == 0
    table = pq.read_table(files / "s.parquet")
    assert table.column_names == ["id", "influence_higher_helps", "loss"]
    facts = json.loads(table.schema.metadata[b"ghostfunc"])
    assert (facts["score"], facts["damping"], facts["fisher"]) == ("influence", 0.1, "sampled")
    found = torch.tensor(table["influence_higher_helps"].to_pylist(), dtype=torch.float64)
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    model_fn, params = gf.hf.causal_lm(lm)
    tokenizer = loaded(model)[1]
    pool, target = (
        encode(Rows.open(f"{name}.jsonl"), tokenizer, max_length=96) for name in ("pool", "target")
    )
    how: Any = {"collate": padded(tokenizer.eos_token_id, max_length=96), "length": pool.length}
    curvature = gf.curvature.ekfac(
        model_fn,
        params,
        list(batches(pool, token_budget=150, **how)),
        likelihood=gf.hf.causal_lm_likelihood(lm),
    )
    expected = gf.influence(
        model_fn,
        params,
        how["collate"]([pool[i] for i in range(40)]),
        how["collate"]([target[i] for i in range(3)]),
        curvature=curvature,
        damping=0.1,
        relative=True,
    ).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    dots = torch.tensor(pq.read_table(files / "dots.parquet")["dot_higher_helps"].to_pylist())
    assert found.argsort().tolist() != dots.argsort().tolist()


def test_the_page_shows_shares_that_add_up(run: Run, files: Path) -> None:
    code, said = run(INFLUENCE + " --report r.html --scores s.parquet --heat 2")
    assert code == 0, said
    text = (files / "r.html").read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    values = data["columns"][0]["values"]
    assert data["ranking"] == "influence_higher_helps"
    assert len(data["heat"]) == 4
    for at, heat in data["heat"].items():
        assert sum(heat["shares"]) == pytest.approx(values[int(at)], rel=1e-3)


def test_the_plan_names_the_curvature(run: Run, files: Path) -> None:
    before = sorted(files.iterdir())
    code, said = run(INFLUENCE + " --dry-run --curvature-rows 12")
    assert code == 0, said
    assert "EK-FAC of 12 rows, sampled labels" in said
    assert "for the curvature" in said
    assert sorted(files.iterdir()) == before


def test_a_config_replays_it(run: Run, files: Path) -> None:
    more = " --curvature-rows 9 --damping 0.5 --diagonal *.wte.weight *.wpe.weight"
    assert run(INFLUENCE + more)[0] == 0
    first = (files / "sel.jsonl").read_bytes()
    (files / "sel.jsonl").unlink()
    assert run("score --config sel.config.json")[0] == 0
    assert (files / "sel.jsonl").read_bytes() == first


class Stopped(BaseException):
    """Stands for a death of the process."""


def dying(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    left = [after]

    def until(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return call(*args, **kwargs)

    return until


DEATHS = [
    *((_passes, "_add", count) for count in (1, 8, 20, 30)),
    (_passes, "_eigenvectors", 2),
    (score_command, "score_dataset", 0),
    (score_module, "_part", 3),
]
"""Where a run dies: in either pass, between the passes, at the end of them, in scoring."""


@pytest.mark.parametrize(("where", "name", "after"), DEATHS)
def test_a_killed_run_goes_on_and_gives_the_same_bits(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: int
) -> None:
    monkeypatch.setattr(score_module, "PART", 8)
    assert run(INFLUENCE)[0] == 0
    whole = (files / "sel.jsonl").read_bytes()
    (files / "sel.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(where, name, dying(getattr(where, name), after))
        with pytest.raises(Stopped):
            run(INFLUENCE)
    code, said = run(INFLUENCE)
    assert code == 2
    assert "Add --resume" in said
    code, said = run(INFLUENCE + " --resume")
    assert code == 0, said
    assert (files / "sel.jsonl").read_bytes() == whole
    assert not (files / "sel.run").exists()


def test_a_finished_curvature_is_not_made_again(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(score_command, "score_dataset", dying(score_module.score_dataset, 0))
        with pytest.raises(Stopped):
            run(INFLUENCE)
    assert [path.name for path in (files / "sel.run" / "curvature").glob("*.safetensors")] == [
        "ekfac.safetensors"
    ]
    monkeypatch.setattr(_passes, "_add", dying(_passes._add, 0))
    assert run(INFLUENCE + " --resume")[0] == 0


@pytest.mark.parametrize("more", ["--draws 2", "--curvature-rows 7", "--fisher empirical"])
def test_another_curvature_is_not_resumed(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_passes, "_add", dying(_passes._add, 20))
        with pytest.raises(Stopped):
            run(INFLUENCE)
    code, said = run(f"{INFLUENCE} {more} --resume")
    assert code == 2
    assert "holds another run" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (LINE + " --damping 0.2", "--damping 0.2: it belongs to --score influence"),
        (LINE + " --score cosine --draws 2", "--draws 2: it belongs to --score influence"),
        (INFLUENCE + " --damping 0", "damping=0.0 must be positive"),
        (INFLUENCE + " --curvature-rows 0", "curvature_rows=0 must be a positive"),
        (INFLUENCE + " --fisher empirical --draws 2", "neither a likelihood nor draws"),
        (INFLUENCE + " --fisher true", "true"),
        (INFLUENCE + " --max-side 4", "more than max_side=4"),
        (INFLUENCE + " --diagonal nothing", "'nothing' matches no parameter"),
        (INFLUENCE + " --damping ten", "ten"),
    ],
)
def test_wrong_options(run: Run, files: Path, line: str, said: str) -> None:
    code, found = run(line)
    assert code in (1, 2)
    assert said in found
    assert "Traceback" not in found
    assert not (files / "sel.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"curvature": {"damping": "x"}}, "'x' is no float"),
        ({"curvature": {"diagonal": "x"}}, "'x' is no list of strings"),
        ({"curvature": {"nothing": 1}}, "there is no option ['nothing']"),
        ({"score": "dots"}, "'dots' is none of dot, cosine, influence"),
    ],
)
def test_bad_configs(run: Run, files: Path, content: Any, said: str) -> None:
    whole = {"model": "m", "pool": "p", "target": "t", "out": "o", **content}
    (files / "bad.json").write_text(json.dumps(whole))
    code, found = run("score --config bad.json")
    assert code == 2
    assert said in found
