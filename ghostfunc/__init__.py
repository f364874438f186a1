"""Ghost quantities of per-sample gradients, in one backward pass.

import ghostfunc as gf

model_fn, params = gf.from_module(module, loss)       # loss(module, batch) -> [n]
scores = gf.ghost_dot_prod(model_fn, params, train, val)

`__init__.pyi` beside this file lists the public names by room. All are imported when the first is
asked for, so that `ghostfunc --help` does not wait for torch.
"""

from ghostfunc._base.lazy import names_of

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = names_of(__name__, __file__)
