"""A trained run and slide files to predictions and heatmaps.

`crcjax.predict(...)` of the Python API is `crcjax.api.predictions.predict`.
"""

from crcjax.environment import make_callable

make_callable(__name__, "crcjax.api.predictions", "predict")
