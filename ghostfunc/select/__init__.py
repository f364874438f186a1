"""Choosing samples by their scores: pure functions from scores to indices or weights.

book = gf.factored_grads(model_fn, params, batch)                  # one backward pass
u = gf.direction(model_fn, params, val)
chosen = gf.select.greats(book.dot_prods(u), book.gram(), k, step=lr / k)
grads = book.weighted_sum(gf.select.uniform_weights(chosen, n))    # no second pass
"""

from ghostfunc.select._choose import greats, sample_k, top_k
from ghostfunc.select._score import reducible_loss
from ghostfunc.select._weigh import softmax_weights, uniform_weights

__all__ = [
    "greats",
    "reducible_loss",
    "sample_k",
    "softmax_weights",
    "top_k",
    "uniform_weights",
]
