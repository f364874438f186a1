"""Scores of train samples: dot products with validation gradients, in every mode.

Read: question, targets, validation, one_run, lengths, by_position.
"""
