"""Training: the step, the loop, validation, ensembles and cross-validation.

`crcjax.train(...)` of the Python API is `crcjax.api.runs.train`.
"""

from crcjax.environment import make_callable

make_callable(__name__, "crcjax.api.runs", "train")
