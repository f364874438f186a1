"""Factored per-sample gradients: their algebra, and what each contraction costs.

A factor is the per-sample gradient of one use of a parameter, unmaterialised; all functions here
take factors, and none knows where they came from.

Read: factor, contract, bundles, pairs, cost.
"""
