"""Predicts slide files or stored slides with a trained run, and draws heatmaps.

`crcjax.predict(...)` of the Python API is `crcjax.api.predictions.predict`.
"""

from crcjax.environment import make_callable

make_callable(__name__, "crcjax.api.predictions", "predict")
