"""The public functions: each is a few lines around one run under taps.

Read: vjp, dot_prods, scores, norms, gram, clipping, factored, verify, explain.
"""
