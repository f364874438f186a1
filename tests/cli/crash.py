"""Kill `ghostfunc score` at random moments, resume it, and compare the file bit for bit.

    python -m tests.cli.crash --kills 10 --chats 500 --seed 0 --score influence

The processes are killed by SIGKILL, at moments drawn over the time an undisturbed run takes. Ten
lines of Python write the file too (but for influence). The tests stop a run of few chats in the
same process instead; this is the long form.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cli.conftest import chat, lines, save_model


def command(out: str, *more: str) -> list[str]:
    run = "import sys; from ghostfunc.cli import main; sys.exit(main())"
    arguments = ["score", "model", "--pool", "pool.jsonl", "--target", "target.jsonl"]
    return [sys.executable, "-c", run, *arguments, "--top", "50", "--out", out, "--quiet", *more]


def start(folder: Path, out: str, *more: str) -> subprocess.Popen[bytes]:
    """A run, from the moment on when it begins to compute."""
    process = subprocess.Popen(
        command(out, *more), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    begun = folder / Path(out).with_suffix(".run") / "config.json"
    before = begun.stat().st_mtime_ns if begun.exists() else 0
    while process.poll() is None and (not begun.exists() or begun.stat().st_mtime_ns == before):
        time.sleep(0.01)
    return process


PYTHON = """
import transformers
import ghostfunc as gf
from ghostfunc.data import Rows, batches, encode, padded, write_rows
lm = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("model")
model_fn, params = gf.hf.causal_lm(lm)
rows, targets = Rows.open("pool.jsonl"), Rows.open("target.jsonl")
pool, target = (encode(x, tokenizer, max_length=96) for x in (rows, targets))
how = {"collate": padded(tokenizer.eos_token_id, max_length=96), "length": pool.length}
kinds = {"val": batches(target, **how), "quantities": ("SCORE", "loss")}
scores = gf.score_dataset(model_fn, params, pool, **kinds, **how)
write_rows("sel.jsonl", rows, scores.top(50, by="SCORE_higher_helps"))
"""


def by_python(folder: Path, score: str) -> None:
    """The same file, by the library."""
    program = PYTHON.replace("SCORE", score)
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    print("by Python: ", end="")
    compare(folder)


def compare(folder: Path, *, last: bool = False) -> None:
    """Where the file is there, it has the bits of the undisturbed run; it is then removed, but for
    the last one."""
    path = folder / "sel.jsonl"
    if path.exists():
        if path.read_bytes() != (folder / "whole.jsonl").read_bytes():
            sys.exit("OTHER BITS")
        print("the same bits", flush=True)
        if not last:
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--chats", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", choices=("dot", "cosine", "influence"), default="dot")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp())
    save_model(folder / "model", n_layer=4, n_embd=64)
    (folder / "pool.jsonl").write_text(lines(chat(i) for i in range(options.chats)))
    (folder / "target.jsonl").write_text(lines(chat(i) for i in range(1000, 1020, 2)))
    score = ("--score", options.score)
    process = start(folder, "whole.jsonl", *score)
    begun = time.perf_counter()
    output = process.communicate()[0].decode()
    seconds = time.perf_counter() - begun
    assert process.returncode == 0, output
    print(f"undisturbed, {seconds:.1f} s of computing", flush=True)
    if options.score != "influence":
        by_python(folder, options.score)
    killed = 0
    while killed < options.kills or not (folder / "sel.jsonl").exists():
        kept = [folder / "sel.run" / x / "run.json" for x in ("", "curvature")]
        stopped = any(path.exists() for path in kept)
        process = start(folder, "sel.jsonl", *score, *(["--resume"] if stopped else []))
        begun = time.perf_counter()
        if killed < options.kills:
            try:
                process.wait(timeout=seconds * moments.uniform(0.1, 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                parts = len(list((folder / "sel.run").rglob("*.*")))
                written = (folder / "sel.jsonl").exists()
                print(f"killed {killed}: {parts} files kept, file written: {written}", flush=True)
                compare(folder)
                continue
        output = process.communicate()[0].decode()
        if process.returncode:
            sys.exit(f"a resumed run failed: {output}")
        print(f"whole after {killed} kills", flush=True)
        # Whatever else the machine does changes how long a run takes.
        seconds = min(seconds, time.perf_counter() - begun)
        compare(folder, last=killed >= options.kills)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
