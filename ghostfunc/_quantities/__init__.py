"""Quantities: what is read off the factors of a parameter.

A quantity hands out one reader per parameter. This room knows factors and no op rule.

Read: quantity, readers.
"""
