"""Other threads: loaders that draw random numbers, calls side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from every_quantity import Case, assert_right, judge
from problems import CASES, energy, sequences, weights
from torch import Generator, Tensor


@contextmanager
def drawing() -> Iterator[None]:
    """Another thread that draws from the global generator as fast as it can."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_another_thread_draws_random_numbers() -> None:
    draw = sequences(4)
    with drawing():
        for k in range(10):  # a new function each time: everything is proved anew

            def model(p: Any, x: Tensor, k: int = k) -> Tensor:
                return energy(torch.tanh(x @ (k + p["w"].tanh())))

            batches = (draw(n, 3, Generator().manual_seed(n)) for n in (3, 2))
            assert_right(Case(model, weights(w=(4, 6)), *batches), ["dots", "norms"])


def test_a_model_in_two_threads() -> None:
    """One function, batches of several shapes, asked from several threads at once."""
    problem = CASES["axes_by_length"]()
    cases = [
        Case(problem.model_fn, problem.params, problem.batch(n, t, n), problem.batch(2, t + 1, t))
        for n, t in ((3, 2), (4, 4), (2, 4), (5, 5), (4, 2), (3, 6))
    ]
    for case in cases:
        assert len(case.g) == len(case.v) == len(leaves := list(case.params)) and leaves
    asked = [(case, name) for case in cases for name in ("dots", "norms", "gram", "one_pass")]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda pair: judge(*pair), asked))
    assert all(v.status == "right" for v in verdicts), [str(v) for v in verdicts]
