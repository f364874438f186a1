"""The recipe of a checkpoint's rows: put on record by the first run, compared by all later ones.

The parameters are the checkpoint's own, the projection is the store's. Beside them the rows depend
on the tensors that the model keeps frozen, on a transform, and on randomness: these are compared
and refused. Functions are only described, for the message when rows computed again differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ghostfunc._base.module import ModuleFn
from ghostfunc._base.types import ModelFn, PyTree
from ghostfunc.store import _checkpoints, _documents
from ghostfunc.store._errors import IncompatibleStoreError, StoreError
from ghostfunc.store._files import PARTIAL, Files
from ghostfunc.store._fingerprint import description, fingerprints


@dataclass(frozen=True)
class Recipe:
    """All that the rows of a checkpoint are made with, beside parameters and projection.

    Attributes:
        frozen: fingerprints by name of what the module closes over, its frozen parameters and its
            buffers; None for a function that is not of `from_module`, which nobody can look into.
        transformed: whether gradients are transformed before the projection.
        randomness: "error" or "different".
        functions: descriptions of the functions that were given.
    """

    frozen: dict[str, str] | None
    transformed: bool
    randomness: str
    functions: dict[str, str]

    @classmethod
    def of(
        cls,
        model_fn: ModelFn,
        params: PyTree,
        *,
        randomness: str,
        functions: Mapping[str, Callable[..., Any] | None],
    ) -> Recipe:
        """The recipe of a call; `functions` by name, "transform" among them."""
        frozen = None
        told: dict[str, Callable[..., Any]] = {"model_fn": model_fn}
        if isinstance(model_fn, ModuleFn):
            state: dict[str, Tensor] = model_fn.closed_over(params)
            frozen = fingerprints(state)
            told = {"loss": model_fn.loss, "module": model_fn.module}
        told |= {name: f for name, f in functions.items() if f is not None}
        return cls(
            frozen=frozen,
            transformed=functions["transform"] is not None,
            randomness=randomness,
            functions={name: description(f) for name, f in told.items()},
        )

    def differences(self, given: Recipe) -> list[str]:
        """In what `given` makes other rows than this recipe did, as far as that can be told."""
        out = []
        if self.frozen is not None and given.frozen is not None:
            names = {n for n, _ in self.frozen.items() ^ given.frozen.items()}
            if names:
                first = sorted(names)[:3]
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                out.append(f"frozen parameters and buffers: {', '.join(first)}{more}")
        if self.transformed != given.transformed:
            with_, without = "made with a transform", "made without a transform"
            ours, theirs = (with_, without) if self.transformed else (without, with_)
            out.append(f"transform: the rows were {ours}, these would be {theirs}")
        if self.randomness != given.randomness:
            out.append(f"randomness: {self.randomness!r} then, {given.randomness!r} now")
        return out

    def hints(self, given: Recipe) -> str:
        """How the functions are described otherwise than they were."""
        names = sorted(self.functions.keys() | given.functions.keys())
        changed = [
            f"{name}: {self.functions.get(name)} then, {given.functions.get(name)} now"
            for name in names
            if self.functions.get(name) != given.functions.get(name)
        ]
        return "; ".join(changed)

    def write(self, files: Files, checkpoint: str) -> None:
        """Put it on record."""
        document = _documents.group({"ghostfunc": asdict(self)})
        _documents.write(files, _key(checkpoint), document, shared=True)

    @classmethod
    def read(cls, files: Files, checkpoint: str) -> Recipe | None:
        """The recipe on record, None if there is none."""
        key = _key(checkpoint)
        attributes = _documents.read_group(files, key)
        if attributes is None:
            return None
        content = attributes.get("ghostfunc")
        if not isinstance(content, dict) or set(content) != set(cls.__annotations__):
            raise StoreError(f"{files}/{key} is damaged: it is no recipe.")
        frozen, functions = content["frozen"], content["functions"]
        plain = frozen is None or _of_strings(frozen)
        if not (plain and _of_strings(functions) and type(content["transformed"]) is bool):
            raise StoreError(f"{files}/{key} is damaged: it is no recipe.")
        return cls(**content)


def _of_strings(x: object) -> bool:
    return isinstance(x, dict) and all(isinstance(v, str) for v in x.values())


def _folder(checkpoint: str) -> str:
    return f"{_checkpoints.folder_of(checkpoint)}/recipe"


def _key(checkpoint: str) -> str:
    return f"{_folder(checkpoint)}/{_checkpoints.DOCUMENT}"


def check(files: Files, checkpoint: str, given: Recipe) -> Recipe | None:
    """The recipe on record, if any; `IncompatibleStoreError` if `given` makes other rows."""
    known = Recipe.read(files, checkpoint)
    if known is None:
        return None
    for name in list(files.names(_folder(checkpoint))):
        if name.endswith(PARTIAL):  # of a process that was killed: nobody needs it any more
            files.delete(f"{_folder(checkpoint)}/{name}")
    differences = known.differences(given)
    if differences:
        raise IncompatibleStoreError(
            f"checkpoint {checkpoint!r} holds rows of another recipe. They differ in "
            f"{'; '.join(differences)}. Rows of different recipes cannot be mixed: call "
            "project_dataset as before, or add a checkpoint of its own (store.add_checkpoint)."
        )
    return known
