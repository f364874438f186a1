"""What readers read of one use where packed rows are shown and samples are documents."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ghostfunc._base.documents import Packing
from ghostfunc._factors.factor import Dense, OneHot, Outer
from ghostfunc._quantities.readers import DotReader, takes_parts
from ghostfunc._rules.registry import ArgName, BroadcastRule, FactorMakers, TwoForms
from ghostfunc._taps.few_calls import Add, FewCalls
from ghostfunc._taps.read_factor import as_param_shape, read_all, read_all_parts
from ghostfunc._taps.recut import in_rows, regrouped
from ghostfunc._trace.trace import CallTrace
from ghostfunc._trace.tracked import Tracked


class PackedUse(NamedTuple):
    """A use in a backward pass over packed rows.

    Attributes:
        call: what the trace knows of it.
        makers: make its factors: those of single positions, unless the rule broadcasts.
        packing: where the documents lie.
        few_calls, add: as in `Sinks`, which takes what is read by its `add`.
    """

    call: CallTrace
    makers: FactorMakers
    packing: Packing
    few_calls: FewCalls | None
    add: Add

    def read(self, name: ArgName, target: Tracked) -> list[Tensor | None] | None:
        """What every reader of a target reads, and the training gradient, as `read_all` returns
        them; None if `few_calls` has it."""
        packing, make = self.packing, self.makers[name]
        readers = target.readers_in_order()
        single = (make.by_position if isinstance(make, TwoForms) else make)()
        broadcasts = isinstance(self.call.rule, BroadcastRule)
        if broadcasts or isinstance(single, Dense):
            factor = single if broadcasts else regrouped(single, packing)
            factor = as_param_shape(factor, target)
            few_calls = self.few_calls
            if few_calls is not None and few_calls.read(self.call, target, factor, self.add):
                return None
            return read_all(factor, target, readers)
        has_own = all(own is not None for own, _ in target.readers.values())
        if has_own and all(isinstance(r, DotReader) for r in readers):
            packed = in_rows(single, packing)
            packed = None if packed is None else as_param_shape(packed, target)
            if isinstance(packed, (Outer, OneHot)):
                return read_all(packed, target, readers, packing)
        if len(packing.groups) > 1 and all(map(takes_parts, readers)):
            parts = [
                (samples, as_param_shape(regrouped(single, of_part), target))
                for samples, of_part in packing.groups
            ]
            return read_all_parts(parts, target, readers)
        return read_all(as_param_shape(regrouped(single, packing), target), target, readers)
