"""The examples of scores and projections run, with tiny settings."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from ghostfunc.store import Store

ROOT = Path(__file__).resolve().parents[2]


def run(
    name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Its output. `a/b.py` is a script, `a.b` a module."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(ROOT))
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        monkeypatch.delitem(sys.modules, name, raising=False)
        runpy.run_module(name, run_name="__main__")
    return capsys.readouterr().out


def test_ghost_mlp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = run("examples/ghost_mlp.py", "--epochs", "2", monkeypatch=monkeypatch, capsys=capsys)
    assert float(re.findall(r"AUROC of ([\d.]+)", out)[-1]) > 0.75
    assert "exact to a tolerance" in out


def test_ghost_proj_mlp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    arguments = ("--out", str(tmp_path), "--rank", "64")
    out = run("examples/ghost_proj_mlp.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    (share,) = re.findall(r"(\d+)% show the same digit", out)
    (overlap,) = re.findall(r"top-10 overlap ([\d.]+)", out)
    assert int(share) > 50
    assert float(overlap) > 0.4


def test_ghost_proj_lm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    out = run("examples/ghost_proj_lm.py", monkeypatch=monkeypatch, capsys=capsys)
    assert re.findall(r"sample +(\d+):", out)[0] == "7"  # the query begins as sample 7 does


OPTIONS = {
    "proj_layers": "*.attn.*.weight",
    "include_embeddings": "True",
    "proj_kind": "orthonormal",
    "proj_rank_total": "64",
    "proj_rank_min": "2",
    "proj_seed": "0",
    "proj_dtype": "float32",
    "max_samples": "24",
    "n_queries": "6",
    "chunk_bytes": "24",
    "batch_size": "8",
    "data_seed": "0",
    "train_steps": "2",
    "plot_ranks": "16 256",
    "plot_seeds": "2",
}


def command_line(tmp_path: Path, **options: str) -> list[str]:
    places = {name: str(tmp_path / name) for name in ("model_dir", "proj_dir", "full_dir")}
    return [
        word
        for name, value in {**places, **OPTIONS, **options}.items()
        if value
        for word in (f"--{name}", *value.split())
    ]


def test_gradproj_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")

    def script(name: str) -> str:
        return run(
            f"examples.gradproj_lm.{name}",
            *command_line(tmp_path),
            monkeypatch=monkeypatch,
            capsys=capsys,
        )

    script("train")
    assert "24 rows written" in script("project")
    assert "0 rows written" in script("project")
    assert "6 queries written" in script("compute_full_gradients")
    out = script("plot_error_with_dim")
    few, many = re.findall(r"rank=(?:16|256), compress=None: .*?error=([\d.]+)", out)
    assert float(many) < 0.7 * float(few)
    assert (tmp_path / "error_with_dim.png").stat().st_size > 10_000
    store = Store.open(tmp_path / "proj_dir")
    assert (store.n_samples, store.tokenizer) == (24, "bytes")
    assert len(store.missing("final")) == 0


def test_every_option_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    words = command_line(tmp_path, proj_seed="", data_seed="")
    with pytest.raises(SystemExit):
        run("examples.gradproj_lm.project", *words, monkeypatch=monkeypatch, capsys=capsys)
    said = capsys.readouterr().err
    assert "--proj_seed" in said
    assert "--data_seed" in said
