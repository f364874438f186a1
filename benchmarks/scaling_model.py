"""What a corpus and a training run would take on many devices, from sizes alone.

    python benchmarks/scaling_model.py

prints the tables of docs/scaling.md. One part is held against counts: `tests/distributed` counts
the collectives of a step over a group of two and four processes.
"""

from __future__ import annotations

from dataclasses import dataclass

TABLE = 3 * 8
"""Bytes per rank of the table that ends a phase: failed, alike, a number."""

INDEX = 8
"""Bytes of one parameter's place in the order of gradients."""


@dataclass(frozen=True)
class Device:
    """A card: dense bfloat16 operations a second, the share of them that is reached, bytes a second
    to other nodes and within one, and the price of an hour."""

    peak: float
    reached: float
    link: float
    within: float
    price: float

    def hours(self, operations: float) -> float:
        """Hours of one device."""
        return operations / (self.peak * self.reached) / 3600


H200 = Device(989e12, 0.4, 50e9, 450e9, 3.0)
"""Peak and NVLink by its data sheet; 40 % reached, 400 Gbit/s of network a device and 3 dollars an
hour are assumed."""


@dataclass(frozen=True)
class Model:
    """A language model: its parameters, the tensors and layers they lie in, and its width."""

    parameters: float
    tensors: int
    layers: int
    width: int


M7 = Model(7e9, 291, 32, 4096)
M70 = Model(70e9, 723, 80, 8192)


def scoring(model: Model, samples: float, tokens: float) -> float:
    """Operations of scores against one direction: per token and parameter 2 forward, 2 for the
    cotangents of activations, 2 for the product with the direction."""
    return 6 * model.parameters * samples * tokens


def projecting(model: Model, samples: float, tokens: float) -> float:
    """Operations of projections: 2 forward and 2 back; the products with thin matrices are left
    out, which are about k_o / n_o of that."""
    return 4 * model.parameters * samples * tokens


def rows_bytes(samples: float, columns: int, bytes_each: int) -> float:
    """What a store of projections takes."""
    return samples * columns * bytes_each


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one step: what it gives to collectives, by kind, and what its link carries."""

    gradients: float
    tables: float
    order: float
    ranks: int

    @property
    def given(self) -> float:
        """Bytes that the rank gives to collectives."""
        return self.gradients + self.tables + self.order

    @property
    def moved(self) -> float:
        """Bytes that leave the rank in rings: an all-reduce of x bytes sends 2 x (r - 1) / r."""
        share = 2 * (self.ranks - 1) / self.ranks
        return share * (self.gradients + self.tables) + self.order


def ddp_step(
    elements: float, tensors: int, ranks: int, *, validations: int = 1, bytes_each: int = 4
) -> Traffic:
    """`ghost_value_and_grad(group=)`: one gradient per validation batch, the training gradient, a
    table after each of them and after the arguments, and the order of the parameters."""
    gradients = (validations + 1) * elements * bytes_each
    return Traffic(gradients, (validations + 2) * ranks * TABLE, tensors * INDEX, ranks)


def fsdp_step(
    model: Model, ranks: int, *, tp: int = 1, models: float = 4.0, bytes_each: int = 2
) -> float:
    """Bytes that leave a rank in a step with sharded parameters: weights are gathered twice, the
    direction once, and the gradient is scattered once, each all but the rank's own shard. With
    tensor parallel layers over `tp` ranks each of them has that part of every weight."""
    shards = ranks // tp
    return models * model.parameters / tp * bytes_each * (shards - 1) / shards


def tp_step(model: Model, ranks: int, tokens: float, *, tp: int, bytes_each: int = 2) -> float:
    """Bytes that leave a rank within its node: two all-reduces of activations a layer forward, and
    two of cotangents back."""
    each = tokens / (ranks // tp) * model.width * bytes_each
    return 4 * model.layers * each * 2 * (tp - 1) / tp


def corpus_table(device: Device) -> str:
    """A billion samples of 512 tokens on a 7 B model."""
    n, t = 1e9, 512
    lines = ["| | FLOPs | hours of one device | dollars | stored |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, operations, stored in (
        ("scores (float32)", scoring(M7, n, t), rows_bytes(n, 1, 4)),
        ("projections, k = 4096, float32", projecting(M7, n, t), rows_bytes(n, 4096, 4)),
        ("projections, k = 4096, bfloat16", projecting(M7, n, t), rows_bytes(n, 4096, 2)),
    ):
        hours = device.hours(operations)
        lines.append(
            f"| {name} | {operations:.1e} | {hours:,.0f} | {hours * device.price:,.0f} "
            f"| {stored / 1e12:.3g} TB |"
        )
    return "\n".join(lines)


def step_table(device: Device) -> str:
    """In-run scores on 70 B, 4 million train tokens and 256 thousand validation tokens a step."""
    train, val = 4e6, 256e3
    lines = [
        "| devices | seconds of computation | between nodes, FSDP2 | FSDP2 with TP of 8 | within |",
        "| --- | --- | --- | --- | --- |",
    ]
    operations = M70.parameters * (8 * train + 6 * val)
    for ranks in (64, 256, 1024):
        seconds = operations / (device.peak * device.reached * ranks)
        alone, both = (fsdp_step(M70, ranks, tp=tp) / device.link for tp in (1, 8))
        within = tp_step(M70, ranks, train + val, tp=8) / device.within
        lines.append(f"| {ranks} | {seconds:.1f} | {alone:.1f} s | {both:.1f} s | {within:.1f} s |")
    return "\n".join(lines)


def ddp_table(device: Device) -> str:
    """What a step over ranks with whole models gives to collectives, float32."""
    lines = ["| ranks | GB that leave a rank | seconds on its link |", "| --- | --- | --- |"]
    for ranks in (2, 8, 64):
        moved = ddp_step(M7.parameters, M7.tensors, ranks).moved
        lines.append(f"| {ranks} | {moved / 1e9:.0f} | {moved / device.link:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(corpus_table(H200), ddp_table(H200), step_table(H200), sep="\n\n")
