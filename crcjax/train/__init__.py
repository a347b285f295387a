"""The mesh, the step, the loop and its checkpoints.

`crcjax.train(...)` of the Python API is `crcjax.api.runs.train`.
"""

from crcjax.environment import make_callable

make_callable(__name__, "crcjax.api.runs", "train")
