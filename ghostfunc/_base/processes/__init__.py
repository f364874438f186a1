"""Processes that compute together: what they agree on, and parameters of which each holds a piece.

Read: ranks, in_step, shards, units, sharding, placements, plans, pieces.
"""
