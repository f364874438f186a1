"""One rank of `torchrun torchrun_worker.py path`: prints which samples every rank wrote."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from helpers import fill, make_store

from ghostfunc.store import Store


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    path, n = sys.argv[1], 40
    if dist.get_rank() == 0:
        # The chunks 1 and 3 are there: what is left is dealt out, not every second chunk.
        fill(make_store(path, n), n, shard=(1, 2))
    dist.barrier()
    store = Store.open(path, writable=True)
    chunks: list[list[int]] = []
    write = store.write

    def noted(ids: list[int], rows: torch.Tensor, checkpoint: str) -> None:
        chunks.append(list(ids))
        write(ids, rows, checkpoint)

    store.write = noted  # type: ignore[method-assign]
    fill(store, n)
    everyone: list[list[list[int]]] = [[], []]
    dist.all_gather_object(everyone, chunks)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may not have ended when the interpreter takes itself apart, which aborts it.
    os._exit(0)


if __name__ == "__main__":
    main()
