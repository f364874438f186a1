"""Rematerialisation: activations of a region are computed again in the backward pass.

Read: remat, region, stand_ins, rerun.
"""
