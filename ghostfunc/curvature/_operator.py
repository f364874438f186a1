"""Curvature operators: symmetric matrices of the size of the parameters, never formed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError, ParamsError
from ghostfunc._base.fingerprint import fingerprint, frozen
from ghostfunc._base.losses import refuse_not_finite
from ghostfunc._base.options import check_path
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.trees import ParamSpec, flatten_params
from ghostfunc._base.types import ModelFn, PyTree
from ghostfunc.curvature import _files
from ghostfunc.curvature._blocks import Block
from ghostfunc.curvature._errors import CurvatureError, check_damping
from ghostfunc.curvature._rows import EigenRows, eigen_rows

SURE = 1e-3
"""The least damping, in units of the rounding of the largest eigenvalue. Less is refused."""


class Operator(ABC):
    """A symmetric operator C on directions, pytrees like `params`."""

    @abstractmethod
    def matvec(self, direction: PyTree) -> PyTree:
        """`C u`."""


class Basis(NamedTuple):
    """`C = (left (x) right) diag(eigenvalues) (left (x) right)^T` of one block.

    Attributes:
        left, right: `[groups, k, k]`, eigenvectors in columns; None is the identity.
        eigenvalues: `[groups, rows, columns]`.
    """

    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor


class BlockReport(NamedTuple):
    """One parameter in a curvature.

    Attributes:
        path, shape, kind: as in the block: "matrix", "vector", "unused" or "identity".
        sides: how both sides are seen, such as `"64 x 32*"`; a star stands for own axes.
        trace: sum of the eigenvalues.
        mean, largest: of the eigenvalues.
        half: the least number of eigenvalues that make half of the trace.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    sides: str
    trace: float
    mean: float
    largest: float
    half: int


@dataclass(frozen=True)
class CurvatureReport:
    """What a curvature holds, parameter by parameter; prints as a table."""

    rows: tuple[BlockReport, ...]
    samples: int
    fisher: str

    def __str__(self) -> str:
        header = ("parameter", "kind", "sides", "trace", "mean", "largest", "half in")
        cells = [header] + [
            (
                r.path,
                r.kind,
                r.sides,
                *(f"{x:.3g}" for x in (r.trace, r.mean, r.largest)),
                str(r.half),
            )
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        rule = "-" * max(map(len, lines))
        title = f"EK-FAC of {self.samples} samples, {self.fisher} Fisher"
        return "\n".join([title, rule, lines[0], rule, *lines[1:]])


class EKFAC(Operator):
    """An eigenvalue-corrected Kronecker-factored curvature; made by `gf.curvature.ekfac`.

    A direction `u` of one parameter goes through its eigenbases and back:

        matvec         U (L * (U^T u))
        solve          U ((U^T u) / (L + damping))
        inverse_sqrt   U ((U^T u) / sqrt(L + damping))

    Attributes:
        blocks: how every parameter is seen.
        samples: how many samples it was made of.
        fisher: whose second moment it is.
        fingerprint: of the parameters it was made at.
        frozen: of the frozen parameters and buffers of its module; "" if nobody can see any.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        bases: Sequence[Basis],
        *,
        samples: int,
        fisher: str,
        fingerprint: str,
        frozen: str = "",
    ) -> None:
        self.blocks, self._bases = tuple(blocks), tuple(bases)
        self.samples, self.fisher = samples, fisher
        self.fingerprint, self.frozen = fingerprint, frozen

    def matvec(self, direction: PyTree) -> PyTree:
        """`C u`, a pytree like `direction`, float32 or wider."""
        return self._spectral(direction, lambda x: x)

    def solve(self, direction: PyTree, damping: float, *, relative: bool = False) -> PyTree:
        """`(C + damping I)^-1 u`, a pytree like `direction`, float32 or wider.

        Args:
            direction: a pytree like `params`.
            damping: positive. It is in the units of the eigenvalues, loss^2 per parameter^2.
            relative: multiply the damping of every parameter by the mean of its eigenvalues.

        Raises:
            OptionError: the damping is not positive, or too small or large for the eigenvalues'
                dtype.
            CurvatureError: the direction is not one of these parameters; or a relative damping of a
                parameter whose eigenvalues are all zero.
        """
        return self._spectral(direction, self._damped(damping, relative, -1.0))

    def inverse_sqrt(self, direction: PyTree, damping: float, *, relative: bool = False) -> PyTree:
        """`(C + damping I)^-1/2 u`: inner products of such rows are `<u, (C + damping I)^-1 v>`.

        Arguments and errors are those of `solve`.
        """
        return self._spectral(direction, self._damped(damping, relative, -0.5))

    def solve_each(
        self, stacked: Sequence[Tensor], damping: float, *, relative: bool = False
    ) -> list[Tensor]:
        """`solve` of several directions, `[k, *shape]` per parameter, in the order of `blocks`."""
        shapes = [tuple(u.shape[1:]) for u in stacked]
        if shapes != [b.shape for b in self.blocks]:
            raise CurvatureError(
                f"stacked must be directions [k, *shape] of {[b.path for b in self.blocks]}, of "
                f"shapes {[b.shape for b in self.blocks]}; got {shapes}."
            )
        f = self._damped(damping, relative, -1.0)
        return [
            _through(u, block, basis, f)
            for u, block, basis in zip(stacked, self.blocks, self._bases, strict=True)
        ]

    def rows(
        self, damping: float, *, relative: bool = False, columns: int | None = None
    ) -> EigenRows:
        """A projection to rows whose inner products are influences.

            row_i = (L + damping)^-1/2 U^T g_i,    <row_i, row_j> = <g_i, (C + damping I)^-1 g_j>

        Pass it to `gf.ghost_project`, or make a store of it: `Store.create(projection=...)` and
        `project_dataset` keep the rows of a training set, and every later query is one row and
        inner products, `store.scores(gf.ghost_project(model_fn, params, queries, rows))`.

        Args:
            damping, relative: as in `solve`.
            columns: keep so many eigendirections, over all parameters, those with the largest
                `L / (L + damping)`. Inner products are then sums over these alone, an
                approximation: `approximation` says how much they hold. None keeps all: rows are as
                long as the model has parameters, and exact.

        Raises:
            OptionError: the damping is not positive, or there are not so many columns.
        """
        return eigen_rows(self.blocks, self._bases, self._damped(damping, relative, -0.5), columns)

    def report(self) -> CurvatureReport:
        """What is held of every parameter; prints as a table."""
        return CurvatureReport(
            tuple(map(_report, self.blocks, self._bases)), self.samples, self.fisher
        )

    def check(self, params: PyTree, model_fn: ModelFn | None = None) -> None:
        """Raise `CurvatureError` unless `params` are those that the curvature was made at, and
        what the module of `model_fn` keeps frozen is what it was."""
        leaves, spec = flatten_params(params)
        self._check_names(spec, leaves)
        if fingerprint(spec.names, leaves) != self.fingerprint:
            raise CurvatureError(
                "the curvature was made at other values of these parameters: a curvature belongs "
                "to one checkpoint. Make it again at this one."
            )
        found = "" if model_fn is None else frozen(model_fn, params)
        if found and self.frozen and found != self.frozen:
            raise CurvatureError(
                "the curvature was made with other frozen parameters or buffers of the module (the "
                "base under an adapter, running averages): the same parameters have another "
                "curvature there. Make it again with this module."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, which appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for i, basis in enumerate(self._bases):
            tensors |= {
                f"{i}.{name}": x.cpu() for name, x in basis._asdict().items() if x is not None
            }
        _files.write(
            path,
            tensors,
            {
                "kind": "ekfac",
                "samples": self.samples,
                "fisher": self.fisher,
                "params": self.fingerprint,
                "frozen": self.frozen,
                "blocks": [asdict(b) for b in self.blocks],
            },
        )

    def to(self, device: torch.device | str) -> EKFAC:
        """The same curvature on another device."""
        bases = [
            Basis(
                None if b.left is None else b.left.to(device),
                None if b.right is None else b.right.to(device),
                b.eigenvalues.to(device),
            )
            for b in self._bases
        ]
        return EKFAC(
            self.blocks,
            bases,
            samples=self.samples,
            fisher=self.fisher,
            fingerprint=self.fingerprint,
            frozen=self.frozen,
        )

    def solve_about(self, direction: PyTree, damping: float) -> PyTree:
        """`solve`, or what is near it where `solve` would have no digit: a preconditioner."""

        def f(eigenvalues: Tensor) -> Tensor:
            if not eigenvalues.numel():
                return eigenvalues
            info = torch.finfo(eigenvalues.dtype)
            least = info.eps * eigenvalues.max()
            return 1 / (eigenvalues + least.clamp(min=min(damping, info.max)))

        return self._spectral(direction, f)

    def _damped(self, damping: float, relative: bool, power: float) -> Callable[[Tensor], Tensor]:
        damping = check_damping(damping)

        def f(eigenvalues: Tensor) -> Tensor:
            by = damping * eigenvalues.mean() if relative else damping
            return (eigenvalues + by) ** power

        if relative:
            for block, basis in zip(self.blocks, self._bases, strict=True):
                if basis.eigenvalues.numel() and not bool(basis.eigenvalues.any()):
                    raise CurvatureError(
                        f"parameter {block.path!r} has no curvature at all (it is {block.kind}), "
                        "so no damping relative to it. Use relative=False."
                    )
        self._check_digits(damping, relative)
        return f

    def _check_digits(self, damping: float, relative: bool) -> None:
        """Raise for a damping beside which the eigenvalues' rounding has no digit, or which their
        dtype does not hold."""
        for block, (_, _, eigenvalues) in zip(self.blocks, self._bases, strict=True):
            if not eigenvalues.numel():
                continue
            info, largest = torch.finfo(eigenvalues.dtype), float(eigenvalues.max())
            by = damping * float(eigenvalues.mean()) if relative else damping
            if not SURE * info.eps * largest <= by <= info.max or by < info.tiny:
                raise OptionError(
                    f"damping={damping!r}: beside eigenvalues of up to {largest:.3g} of parameter "
                    f"{block.path!r}, {by:.3g} has no digits left in {eigenvalues.dtype}, and "
                    "rounding errors would be all that is seen along directions that no sample has "
                    "(or all would be zero). Use a damping nearer to the eigenvalues, which "
                    "curvature.report() shows, or float64."
                )

    def _spectral(self, direction: PyTree, f: Callable[[Tensor], Tensor]) -> PyTree:
        leaves, spec = flatten_params(direction, "direction")
        refuse_not_finite(leaves, spec, "direction")
        self._check_names(spec, leaves)
        return spec.unflatten(
            [
                _through(u[None], block, basis, f)[0]
                for u, block, basis in zip(leaves, self.blocks, self._bases, strict=True)
            ]
        )

    def _check_names(self, spec: ParamSpec, leaves: Sequence[Tensor]) -> None:
        own = {b.path: b.shape for b in self.blocks}
        given = {name: tuple(x.shape) for name, x in zip(spec.names, leaves, strict=True)}
        if list(own) != list(given):
            missing = [x for x in own if x not in given]
            extra = [x for x in given if x not in own]
            raise CurvatureError(
                "the curvature is one of other parameters. Missing here: "
                f"{missing or 'nothing'}; not in the curvature: {extra or 'nothing'}."
            )
        for path, shape in own.items():
            if given[path] != shape:
                raise CurvatureError(
                    f"the curvature was made for parameter {path!r} of shape {shape}, but it has "
                    f"shape {given[path]} here."
                )


def load(path: str | os.PathLike[str], params: PyTree | None = None) -> EKFAC:
    """Read what `EKFAC.save` wrote.

    Args:
        path: the file.
        params: if given, the parameters that the curvature must have been made at; it is put on
            their device.

    Raises:
        CurvatureError: the file is cut short or another one, or the parameters are others.
    """
    check_path("path", path)
    tensors, about = _files.read(path)
    if about.get("kind") != "ekfac":
        raise CurvatureError(
            f"{os.fspath(path)!r} holds {about.get('kind')!r}, the state of a computation; "
            "expected what EKFAC.save writes."
        )
    _files.check_entries(path, about, ("blocks", "samples", "fisher", "params"))
    for b in about["blocks"]:
        _files.check_entries(path, b, Block.__dataclass_fields__)
    blocks = [Block(**{**b, "shape": tuple(b["shape"])}) for b in about["blocks"]]
    bases = [_basis(path, i, block, tensors) for i, block in enumerate(blocks)]
    out = EKFAC(
        blocks,
        bases,
        samples=about["samples"],
        fisher=about["fisher"],
        fingerprint=about["params"],
        frozen=about.get("frozen", ""),
    )
    if params is None:
        return out
    out.check(params)
    return out.to(flatten_params(params)[0][0].device)


def _basis(
    path: str | os.PathLike[str], number: int, block: Block, tensors: Mapping[str, Tensor]
) -> Basis:
    """The basis of a block in a file; `CurvatureError` unless its tensors are the block's."""
    groups, rows, columns = block.sizes
    shapes: dict[str, tuple[int, ...]] = {"eigenvalues": block.sizes}
    shapes |= {"left": (groups, rows, rows)} if block.left else {}
    shapes |= {"right": (groups, columns, columns)} if block.right else {}
    _files.check_entries(path, tensors, (f"{number}.{name}" for name in shapes))
    found = {name: tensors[f"{number}.{name}"] for name in shapes}
    for name, x in found.items():
        if x.shape != shapes[name] or not bool(x.isfinite().all()):
            raise CurvatureError(
                f"{os.fspath(path)!r} is damaged: {name} of parameter {block.path!r} must be "
                f"finite, of shape {shapes[name]}; its shape is {tuple(x.shape)}."
            )
    return Basis(found.get("left"), found.get("right"), found["eigenvalues"])


def _through(u: Tensor, block: Block, basis: Basis, f: Callable[[Tensor], Tensor]) -> Tensor:
    """`U f(L) U^T u` of directions `[k, *shape]`."""
    with unrounded(u):
        return _rotated_through(u, block, basis, f)


def _rotated_through(
    u: Tensor, block: Block, basis: Basis, f: Callable[[Tensor], Tensor]
) -> Tensor:
    left, right, eigenvalues = basis
    if u.device != eigenvalues.device:
        raise ParamsError(
            f"direction leaf {block.path!r} is on {u.device}, the curvature on "
            f"{eigenvalues.device}. Move one: curvature.to(device)."
        )
    x = wide(u)
    dtype = torch.promote_types(x.dtype, eigenvalues.dtype)
    x = x.to(dtype).reshape(len(x), *block.sizes)
    left, right = (None if v is None else v.to(dtype) for v in (left, right))
    x = x if left is None else left.mT @ x
    x = x if right is None else x @ right
    x = x * f(eigenvalues.to(dtype))
    x = x if left is None else left @ x
    x = x if right is None else x @ right.mT
    return x.reshape(u.shape)


def _report(block: Block, basis: Basis) -> BlockReport:
    values = basis.eigenvalues.double().flatten()
    count = len(values)
    trace = float(values.sum())
    ordered = values.sort(descending=True).values.cumsum(0)
    half = int((ordered < trace / 2).sum()) + 1 if trace > 0 else 0
    groups, rows, columns = block.sizes
    sides = " x ".join(
        f"{size}{'' if has_basis or size == 1 else '*'}"
        for size, has_basis in ((rows, block.left), (columns, block.right))
    )
    return BlockReport(
        block.path,
        block.shape,
        block.kind,
        sides if groups == 1 else f"{groups} of {sides}",
        trace,
        trace / count if count else 0.0,
        float(values.max()) if count else 0.0,
        half,
    )
