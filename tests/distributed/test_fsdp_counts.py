"""What a step on a sharded model moves and keeps, counted, beside FSDP2's own step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fsdp_ranks import ranks_of

WORLD = 2


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory: Path = tmp_path_factory.mktemp("counted")
    for done in ranks_of("fsdp_counts.py", WORLD, directory):
        assert done.returncode == 0, done.stdout[-4000:]
    found: dict[str, Any] = json.loads((directory / "0.json").read_text())
    for name, row in found.items():
        if isinstance(row, dict):
            print(
                f"{name}: {row['bytes'] / found['model']:.2f} models moved, "
                f"{row['peak'] / found['unit']:.2f} units alive, {row['meetings']} meetings"
            )
    return found


@pytest.mark.parametrize(
    ("call", "models"),
    [
        ("ghost_value_and_grad with a direction", 4.0),  # W twice, u once, the gradient once
        ("ghost_dot_prod with a direction", 3.0),
        ("ghost_value_and_grad with val", 3.0),  # u comes up on every rank
        ("ghost_dot_prod with val", 2.0),
        ("ghost_value_and_grad with much val", 5.0),  # u is summed up and gathered
        ("ghost_dot_prod with much val", 4.0),
        ("ghost_value_and_grad with longer val", 7.0),  # a pass of val, and one with a direction
        ("ghost_norm", 2.0),
        ("direction", 3.0),
        ("FSDP2", 3.0),
    ],
)
def test_bytes_moved(counted: dict[str, Any], call: str, models: float) -> None:
    assert counted[call]["bytes"] / counted["model"] == pytest.approx(models)


@pytest.mark.parametrize(
    ("call", "units", "gradient"),
    [
        ("ghost_value_and_grad with a direction", 3, True),  # W, u and the gradient
        ("ghost_dot_prod with a direction", 2, False),
        ("ghost_value_and_grad with val", 3, True),
        ("ghost_dot_prod with val", 2, False),
        ("ghost_value_and_grad with much val", 3, True),
        ("ghost_dot_prod with much val", 2, False),
        ("ghost_norm", 1, False),
        ("direction", 2, True),
    ],
)
def test_units_alive(counted: dict[str, Any], call: str, units: int, gradient: bool) -> None:
    """Beside the pieces of parameters and direction: those of the gradient, and gathered units. A
    tenth of a unit is for activations."""
    pieces = counted["model"] / WORLD if gradient else 0
    gathered = counted[call]["peak"] - pieces
    assert gathered <= (units + 0.1) * counted["unit"]
    assert counted[call]["peak"] < counted["FSDP2"]["peak"]
