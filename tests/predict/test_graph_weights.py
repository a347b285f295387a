"""Graphs with smaller weights compute what the weights in float32 do, to the precision of the smaller type."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from crcjax.predict.graph_weights import quantised, with_weights
from crcjax.predict.onnx_ensemble import open_session

onnx = pytest.importorskip("onnx")
SIZES = {"float32": 4, "float16": 2, "int8": 1}


def _model(kernel: np.ndarray, bias: np.ndarray):
    """relu(x @ kernel + bias)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Gemm", ["x", "kernel", "bias"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(bias, "bias")]
    graph = helper.make_graph(nodes, "layer", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("weights", SIZES)
def test_a_layer_is_smaller_and_its_output_differs_by_the_rounding_of_its_weights_alone(weights: str) -> None:
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(256, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    model = _model(kernel, bias)
    before = model.SerializeToString()
    smaller = with_weights(model, weights)
    assert model.SerializeToString() == before
    assert len(smaller.SerializeToString()) < SIZES[weights] * kernel.size + 2000
    onnx.checker.check_model(smaller)
    stored = {
        "float32": kernel,
        "float16": kernel.astype(np.float16).astype(np.float32),
        "int8": np.multiply(*quantised(kernel, 1)),
    }[weights]
    stored_bias = bias.astype(np.float16).astype(np.float32) if weights == "float16" else bias
    x = rng.normal(size=(5, 256)).astype(np.float32)
    session = open_session(smaller.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": x})[0], np.maximum(x @ stored + stored_bias, 0), atol=1e-3)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4), elements=st.floats(-1e3, 1e3, width=32)), st.data())
def test_a_quantised_value_is_within_half_a_step_of_its_value(values: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, values.ndim - 1))
    integers, scale = quantised(values, axis)
    steps = np.moveaxis(np.broadcast_to(scale, np.moveaxis(values, axis, -1).shape), -1, axis)
    assert np.abs(integers).max() <= 127
    np.testing.assert_array_less(np.abs(integers * steps - values), 0.501 * steps + 1e-6)
