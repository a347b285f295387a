"""Smaller weights for ONNX graphs: stored as float16 or int8, and converted to float32 where they are used.

Only storage changes. Activations, normalisation and softmax stay float32, so that no layer can overflow, and every runtime
computes the same on CPUs without instructions for float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int8

if TYPE_CHECKING:
    from onnx import ModelProto

WEIGHTS = ("float32", "float16", "int8")
# Smaller arrays, and with int8 vectors such as biases, stay float32: they take no space, and sums depend on them.
_LEAST_VALUES = 64
_INT8_MAX = 127


def with_weights(model: ModelProto, weights: str) -> ModelProto:
    """A copy of an ONNX model that stores its weights as one of WEIGHTS.

    With "float16" a Cast follows each weight, with "int8" a DequantizeLinear with one scale for each output feature.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    copy = ModelProto()
    copy.CopyFrom(model)
    graph, conversions = copy.graph, []
    for tensor in list(graph.initializer) if weights != "float32" else ():
        values, name = numpy_helper.to_array(tensor), tensor.name
        if values.dtype != np.float32 or values.size < _LEAST_VALUES or (weights == "int8" and values.ndim < 2):
            continue
        stored = f"{name}_{weights}"
        if weights == "float16":
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
            conversions.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
            continue
        # Features are the columns of a matrix, and the first axis of a convolution's kernel (output, input, y, x).
        axis = 0 if values.ndim > 2 else values.ndim - 1
        integers, scale = quantised(values, axis)
        tensor.CopyFrom(numpy_helper.from_array(integers, stored))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        conversions.append(helper.make_node("DequantizeLinear", [stored, f"{name}_scale"], [name], axis=axis))
    nodes = [*conversions, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def quantised(
    values: Float32[np.ndarray, "*axis"], axis: int
) -> tuple[Int8[np.ndarray, "*axis"], Float32[np.ndarray, " feature"]]:
    """Symmetric int8 values and the scale of each index along an axis; their product is within half a scale of `values`."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(axis=others)
    scale = np.where(largest > 0, largest / _INT8_MAX, 1).astype(np.float32)
    by_axis = scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return np.rint(values / by_axis).astype(np.int8), scale
