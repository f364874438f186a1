"""The ground: model functions, parameters and batches, and per-sample gradients by definition.

Imports no other room, so the by-definition oracle can know no op rule, no trace and no tap.

Read: types, errors, trees, module, purity, definition; `processes` for sharded parameters.
"""
