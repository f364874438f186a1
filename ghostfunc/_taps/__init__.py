"""Taps: one run of a traced model, whose backward pass returns the quantities.

Read: use, tap, mode, run, use_shapes; then proof, gradients_proof, numbers_proof, readings. `remat`
runs regions of a model again in the backward pass.
"""
