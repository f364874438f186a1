"""Metagradients: what every sample's weight in a training run changed its final loss by.

training = gf.unrolled.Training(model_fn, params, steps, optimizer=gf.unrolled.adam(lr=1e-3))
trained = gf.unrolled.train(training, keep_every=30)
values = gf.unrolled.metagradients(trained, val).scores.values      # negative: the sample helps
"""

from ghostfunc.unrolled._errors import UnrolledError
from ghostfunc.unrolled._forward import Trained, train
from ghostfunc.unrolled._metagradients import Metagradients, StepValues, metagradients
from ghostfunc.unrolled._optimizers import Optimizer, adam, adamw, clipped, sgd
from ghostfunc.unrolled._training import Micro, Training

__all__ = [
    "Metagradients",
    "Micro",
    "Optimizer",
    "StepValues",
    "Trained",
    "Training",
    "UnrolledError",
    "adam",
    "adamw",
    "clipped",
    "metagradients",
    "sgd",
    "train",
]
