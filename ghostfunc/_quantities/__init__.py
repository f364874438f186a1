"""Quantities: numbers of per-sample gradients, which readers read off factors.

A quantity hands out one reader per parameter. This room knows factors and no op rule.

Read: quantity, readers.
"""
