"""A model as an ONNX graph: one node for almost every layer, weights and names as in ``Params``.

The graph is written with the ``onnx`` package alone. Its input ``images`` is (N, C, H, W) with any N, of bytes, which
it scales by 1/255 as every engine does, or of float32 in [0, 1]; its output ``logits`` is (N, classes). It is a graph
for prediction: Dropout is left out and BatchNorm takes its running statistics. Operators are those of opset 20, the
first with GELU. Whoever runs the graph folds and fuses as it likes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from convolt import layers
from convolt.errors import MissingDependency
from convolt.layers import Layer, Shape, walk
from convolt.model import Model
from convolt.params import Array, Params

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
INPUT, OUTPUT = "images", "logits"


def to_onnx(model: Model, params: Params, byte_input: bool = False) -> "ModelProto":
    """The graph of ``model`` with copies of ``params`` in float32. Raises MissingDependency.

    byte_input: whether the input is uint8, which the graph scales to [0, 1], instead of float32.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingDependency("onnx", "writing ONNX", "export") from None
    graph = _Graph(params)
    value = INPUT
    if byte_input:
        value = graph.node("Cast", "images as float", value, to=TensorProto.FLOAT)
        value = graph.node("Mul", "images in [0, 1]", value, graph.constant("scale", np.array(1 / 255)))
    value = _chain(graph, model.layers, model.input_shape, "", value)
    graph.nodes.append(_Node("Identity", OUTPUT, (value,), {}))
    image = helper.make_tensor_value_info(
        INPUT, TensorProto.UINT8 if byte_input else TensorProto.FLOAT, ["N", *model.input_shape]
    )
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", *model.output_shape])
    nodes = [
        helper.make_node(node.operator, node.inputs, [node.output], name=f"node {node.output}", **node.attributes)
        for node in graph.nodes
    ]
    arrays = [numpy_helper.from_array(array, name) for name, array in graph.arrays.items()]
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(
        helper.make_graph(nodes, "convolt", [image], [logits], arrays),
        producer_name="convolt",
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )


@dataclass(frozen=True)
class _Node:
    """An operator with one output, whose name is also that of the value."""

    operator: str
    output: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass
class _Graph:
    """What has been written so far: nodes in order, and arrays by name."""

    params: Params
    nodes: list[_Node] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)

    def node(self, operator: str, output: str, *inputs: str, **attributes: Any) -> str:
        """Append an operator; the name of its output."""
        self.nodes.append(_Node(operator, output, inputs, attributes))
        return output

    def constant(self, name: str, array: Array) -> str:
        """Keep an array in float32; its name."""
        self.arrays[name] = np.ascontiguousarray(array, np.float32).reshape(array.shape)
        return name

    def parameter(self, name: str) -> str:
        """Keep a parameter or a buffer of the model; its name."""
        return self.constant(name, self.params[name] if name in self.params else self.params.buffers[name])


def _chain(graph: _Graph, members: tuple[Layer, ...], shape: Shape, prefix: str, value: str) -> str:
    """Layers in a row, a Residual opened; the name of the last value."""
    for name, layer, before, _ in walk(members, shape, prefix):
        if isinstance(layer, layers.Residual):
            body = _chain(graph, layer.body, before, f"{name}.body.", value)
            shortcut = _chain(graph, layer.shortcut, before, f"{name}.shortcut.", value)
            value = graph.node("Add", name, body, shortcut)
        else:
            value = _WRITERS[type(layer)](graph, layer, name, value)
    return value


# --- layers: (graph, layer, name, input value) -> output value -------------------------------------------------------


def _conv2d(graph: _Graph, layer: layers.Conv2d, name: str, x: str) -> str:
    window = layer.geometry
    arrays = [graph.parameter(f"{name}.{local}") for local in layer.parameters()]
    return graph.node("Conv", name, x, *arrays, group=layer.groups, dilations=window.dilation, **_window(window))


def _dense(graph: _Graph, layer: layers.Dense, name: str, x: str) -> str:
    return graph.node("Gemm", name, x, *(graph.parameter(f"{name}.{local}") for local in layer.parameters()), transB=1)


def _batch_norm(graph: _Graph, layer: layers.BatchNorm2d, name: str, x: str) -> str:
    C = layer.num_features
    if layer.affine:
        affine = [graph.parameter(f"{name}.weight"), graph.parameter(f"{name}.bias")]
    else:
        affine = [graph.constant(f"{name}.ones", np.ones(C)), graph.constant(f"{name}.zeros", np.zeros(C))]
    statistics = (graph.parameter(f"{name}.running_mean"), graph.parameter(f"{name}.running_var"))
    return graph.node("BatchNormalization", name, x, *affine, *statistics, epsilon=layer.eps)


def _normalize(graph: _Graph, layer: layers.Normalize, name: str, x: str) -> str:
    mean, std = (np.array(values)[:, None, None] for values in (layer.mean, layer.std))
    centered = graph.node("Sub", f"{name} centered", x, graph.constant(f"{name}.mean", mean))
    return graph.node("Div", name, centered, graph.constant(f"{name}.std", std))


def _silu(graph: _Graph, layer: layers.SiLU, name: str, x: str) -> str:
    return graph.node("Mul", name, x, graph.node("Sigmoid", f"{name} gate", x))


def _max_pool(graph: _Graph, layer: layers.MaxPool2d, name: str, x: str) -> str:
    return graph.node("MaxPool", name, x, **_window(layer.geometry))


def _average_pool(graph: _Graph, layer: layers.AvgPool2d, name: str, x: str) -> str:
    counted = int(layer.count_include_pad)
    return graph.node("AveragePool", name, x, count_include_pad=counted, **_window(layer.geometry))


def _global_average(graph: _Graph, layer: layers.GlobalAvgPool2d, name: str, x: str) -> str:
    return graph.node("Flatten", name, graph.node("GlobalAveragePool", f"{name} as image", x))


def _window(window: layers.Window) -> dict[str, tuple[int, ...]]:
    """Kernel, strides, and padding as ONNX has it: all beginnings, then all ends."""
    (top, bottom), (left, right) = window.pads
    return {"kernel_shape": window.kernel, "strides": window.stride, "pads": (top, left, bottom, right)}


_WRITERS: dict[type, Callable[[_Graph, Any, str, str], str]] = {
    layers.Conv2d: _conv2d,
    layers.BatchNorm2d: _batch_norm,
    layers.ReLU: lambda graph, layer, name, x: graph.node("Relu", name, x),
    layers.LeakyReLU: lambda graph, layer, name, x: graph.node("LeakyRelu", name, x, alpha=layer.negative_slope),
    layers.GELU: lambda graph, layer, name, x: graph.node("Gelu", name, x, approximate=layer.approximate),
    layers.SiLU: _silu,
    layers.MaxPool2d: _max_pool,
    layers.AvgPool2d: _average_pool,
    layers.GlobalAvgPool2d: _global_average,
    layers.Dropout: lambda graph, layer, name, x: x,
    layers.Flatten: lambda graph, layer, name, x: graph.node("Flatten", name, x),
    layers.Dense: _dense,
    layers.Normalize: _normalize,
}
