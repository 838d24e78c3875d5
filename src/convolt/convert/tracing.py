"""Reading PyTorch modules: structure where there is one, a traced graph where there is not.

A converted part is a ``_Step``: the layer, and its arrays under the layer's local names. Steps nest as layers do, so
names need no map: a chain puts its index before each name, a Residual its branch.

In a graph every value is the tuple of steps that made it from the input. Two values that are added share a history;
what follows their last common step is the body and the shortcut of a Residual. An in-place operation changes the value
under all of its names, as it does in PyTorch.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from convolt import layers
from convolt.convert.leaves import layer_of, module_of_function, unsupported
from convolt.convert.modules import GlobalAvgPool2d, Normalize, Residual
from convolt.errors import ConfigError, ShapeError
from convolt.layers import Layer, Shape
from convolt.model import Model
from convolt.params import Array, Params


def from_torch(net: nn.Module, input_shape: Shape) -> tuple[Model, Params]:
    """``net`` for images of ``input_shape`` (C, H, W), without batch, as a model and a copy of its weights.

    A net in float64 gives float64 parameters, any other float32. AdaptiveAvgPool2d(1) becomes GlobalAvgPool2d, whose
    output is (C,). Raises ConfigError that names a module by its path when there is no layer for it, ShapeError.
    """
    input_shape = tuple(input_shape)
    _check_no_sharing(net)
    members, arrays = _chain(_steps_of(net, "", input_shape))
    model = Model(input_shape, members)
    is_double = any(parameter.dtype == torch.float64 for parameter in net.parameters())
    params = Params(model, np.float64 if is_double else np.float32)
    params.load_state_dict(arrays)
    return model, params


def _check_no_sharing(net: nn.Module) -> None:
    seen: dict[int, str] = {}
    tensors = chain(net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        if id(tensor) in seen:
            raise ConfigError(f"from_torch: {name} and {seen[id(tensor)]} are one tensor; a Model cannot share weights")
        seen[id(tensor)] = name


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Step:
    """A converted part: its layer, its arrays by the layer's local names, and the shape of its output."""

    layer: Layer
    arrays: dict[str, Array]
    output_shape: Shape


Steps = Sequence[_Step]


def _chain(steps: Steps) -> tuple[tuple[Layer, ...], dict[str, Array]]:
    """Layers in a row, with their index before each name."""
    arrays = {f"{index}.{name}": array for index, step in enumerate(steps) for name, array in step.arrays.items()}
    return tuple(step.layer for step in steps), arrays


def _step(path: str, layer: Layer, arrays: dict[str, Array], shape: Shape) -> _Step:
    try:
        return _Step(layer, arrays, layer.output_shape(shape))
    except ShapeError as error:
        raise ShapeError(f"from_torch: {path}: {error}") from None


def _sum(path: str, body: Steps, shortcut: Steps, shape: Shape) -> _Step:
    """``body(x) + shortcut(x)``."""
    (inner, body_arrays), (outer, shortcut_arrays) = _chain(body), _chain(shortcut)
    arrays = {f"body.{name}": array for name, array in body_arrays.items()}
    arrays |= {f"shortcut.{name}": array for name, array in shortcut_arrays.items()}
    return _step(path, layers.Residual(inner, outer), arrays, shape)


# --- modules ---------------------------------------------------------------------------------------------------------


def _steps_of(module: nn.Module, path: str, shape: Shape) -> Steps:
    """A module as steps: those of a Sequential are its children, one each, so that indices and names stay."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise unsupported(f"{path or 'the net'} has a forward hook")
    if _is_sequential(module):
        return _children(module, path, shape)
    if isinstance(module, nn.Identity):
        return []
    if isinstance(module, Residual):
        body, shortcut = (_children(module[name], f"{path}.{name}", shape) for name in ("body", "shortcut"))
        return [_sum(path, body, shortcut, shape)]
    if _is_leaf(module):
        return [_step(path, layer_of(module, path), _arrays(module), shape)]
    return _Graph(module, path, shape).steps()


def _children(sequential: nn.Sequential, path: str, shape: Shape) -> Steps:
    steps: list[_Step] = []
    for name, child in sequential._modules.items():  # named_children() leaves out a ReLU that is used twice
        parts = _steps_of(child, _joined(path, name), shape)
        shape = parts[-1].output_shape if parts else shape
        if len(parts) == 1 and not _is_sequential(child):
            steps.append(parts[0])
        else:
            members, arrays = _chain(parts)
            steps.append(_Step(layers.Sequential(members), arrays, shape))
    return steps


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_leaf(module: nn.Module) -> bool:
    """PyTorch's own modules and ours are taken whole; everything else is looked into."""
    ours = isinstance(module, Residual | GlobalAvgPool2d | Normalize)
    return ours or (type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential))


def _arrays(module: nn.Module) -> dict[str, Array]:
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return {name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in state.items()}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- graphs ----------------------------------------------------------------------------------------------------------

_IN_PLACE_ADDITIONS = {operator.iadd, "add_"}
_ADDITIONS = {operator.add, torch.add, "add", *_IN_PLACE_ADDITIONS}
_RESHAPES = {"view", "reshape", torch.reshape}
_ARITHMETIC = {operator.getitem, operator.mul}  # on sizes

ANY_SIZE = -1  # PyTorch's word for a size that is not said, here also the batch's


class _Tracer(fx.Tracer):  # type: ignore[misc]  # torch is Any to mypy
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)


@dataclass(eq=False)
class _Image:
    """A value of the graph: the steps from the input to it. Names of one tensor share one _Image."""

    steps: tuple[_Step, ...]
    input_shape: Shape

    @property
    def shape(self) -> Shape:
        return self.steps[-1].output_shape if self.steps else self.input_shape

    def then(self, steps: Steps, in_place: bool) -> "_Image":
        """The value after ``steps``; no steps, or steps in place, give another name to the same tensor."""
        if in_place:
            self.steps = (*self.steps, *steps)
        return self if in_place or not steps else _Image((*self.steps, *steps), self.input_shape)


class _Graph:
    """The graph of a module whose forward is code."""

    def __init__(self, module: nn.Module, path: str, shape: Shape) -> None:
        self._module = module
        self._path = path
        self._shape = shape
        self._values: dict[fx.Node, Any] = {}
        self._called: set[str] = set()

    def steps(self) -> Steps:
        """Every node in order; the output's history is the answer. Raises ConfigError."""
        where = self._path or type(self._module).__name__
        try:
            graph = _Tracer().trace(self._module)
        except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise unsupported(f"{where} cannot be traced by torch.fx ({reason})") from None
        for node in graph.nodes:
            if node.op != "output":
                self._values[node] = self._value(node, f"{node.name} in the forward of {where}")
        output = self._values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if not isinstance(output, _Image):
            raise unsupported(f"{where} returns {node.args[0]}")
        return output.steps

    def _value(self, node: fx.Node, where: str) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "placeholder" and not self._values:
            return _Image((), self._shape)
        if node.op in ("call_function", "call_method") and node.target in _ARITHMETIC and not _images(args):
            return node.target(*args)
        if not _images(args[:1]):  # a second input, a tensor of the module's own
            raise unsupported(where)
        if node.op == "call_module":
            return self._applied(args[0], self._submodule(node.target), _joined(self._path, node.target))
        if node.target in _ADDITIONS:
            return self._added(node, args, kwargs, where)
        return self._called_on(args[0], node.target, args[1:], kwargs, where)

    def _submodule(self, target: str) -> nn.Module:
        module = self._module.get_submodule(target)
        if target in self._called and any(True for _ in module.parameters()):
            path = _joined(self._path, target)
            raise ConfigError(f"from_torch: {path} is called twice; a Model cannot share weights")
        self._called.add(target)
        return module

    def _applied(self, image: _Image, module: nn.Module, path: str) -> _Image:
        return image.then(_steps_of(module, path, image.shape), getattr(module, "inplace", False))

    def _called_on(self, image: _Image, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Any:
        if target == "size" or (target is getattr and args == ("shape",)):
            sizes = (ANY_SIZE, *image.shape)
            return sizes[args[0]] if target == "size" and args else sizes
        if target in _RESHAPES:
            given = tuple(args[0]) if args and isinstance(args[0], tuple | list) else args
            if given not in ((ANY_SIZE, ANY_SIZE), (ANY_SIZE, math.prod(image.shape))):
                raise unsupported(f"{where} to {given}")
            return self._applied(image, nn.Flatten(), where)
        make = module_of_function(target)
        if make is None:
            raise unsupported(where)
        return self._applied(image, make(*args, **kwargs), where)

    def _added(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> _Image:
        """The sum of two values, as a Residual after their last common step; the longer branch is the body."""
        if len(_images(args)) != 2 or kwargs:
            raise unsupported(f"{where} of something else than two branches")
        a, b = args
        common = [step for step, _ in takewhile(lambda pair: pair[0] is pair[1], zip(a.steps, b.steps, strict=False))]
        shortcut, body = sorted((b.steps[len(common) :], a.steps[len(common) :]), key=len)
        start = _Image(tuple(common), self._shape)
        total = start.then([_sum(where, body, shortcut, start.shape)], in_place=False)
        if node.target in _IN_PLACE_ADDITIONS:
            a.steps = total.steps
            return a
        return total


def _images(values: Sequence[Any]) -> list[_Image]:
    return [value for value in values if isinstance(value, _Image)]
