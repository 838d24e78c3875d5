"""Functions that kernels call: typed and lowered by Numba, and made into machine code only as parts of a kernel.

Numba's own ``njit`` optimizes every function and makes machine code of it before another one may call it. A kernel has
some ten such parts, of which nobody calls the machine code: it took a third of the time that a kernel took to compile.
`min` and `max` of two numbers are such functions of Numba's; in kernels they are two instructions.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import types
from numba.core import typing
from numba.core.codegen import AOTCodeLibrary
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_model, typeof_impl

from convolt.engines.jit.frontend import lower

Function = TypeVar("Function", bound=Callable[..., Any])


def inlined(function: Function) -> Function:
    """A function that kernels, and what they call, may call with positional arguments."""
    return cast(Function, _Inlined(function))


class _Inlined:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.signature = function, inspect.signature(function)


class _Kind(types.Callable, types.Dummy):  # type: ignore[misc]
    """The type of one such function, as Numba wants it."""

    def __init__(self, inlined: _Inlined) -> None:
        self.inlined = inlined
        super().__init__(f"inlined {inlined.function.__qualname__} {id(inlined)}")

    def get_call_type(self, context: Any, args: Any, kws: Any) -> Any:
        def unchanged(index: int, parameter: Any, kind: Any) -> Any:
            return kind

        def packed(index: int, parameter: Any, kinds: Any) -> Any:
            return types.StarArgTuple(kinds)

        args = tuple(types.unliteral(kind) for kind in args)
        args = typing.fold_arguments(self.inlined.signature, args, kws, unchanged, unchanged, packed)
        return context.part(self.inlined, args).replace(pysig=self.inlined.signature)

    def get_call_signatures(self) -> Any:
        return [], True

    def get_impl_key(self, signature: Any) -> Any:
        return self.inlined, signature.args


register_model(_Kind)(models.OpaqueModel)


@typeof_impl.register(_Inlined)
def _kind_of(value: _Inlined, context: Any) -> _Kind:
    return _Kind(value)


class _Part(AOTCodeLibrary):  # type: ignore[misc]
    """IR that is left as it is until it is linked into a kernel."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass


def _chosen(sign: str) -> Any:
    """The second of two numbers where it compares with the first like this, else the first: Python's min and max."""

    @intrinsic
    def chosen(typingctx: Any, first: Any, second: Any) -> Any:
        kind = typingctx.unify_types(types.unliteral(first), types.unliteral(second))
        if not isinstance(kind, types.Integer | types.Float):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            one, other = (context.cast(builder, *pair, kind) for pair in zip(args, signature.args, strict=True))
            if isinstance(kind, types.Float):
                compare = builder.fcmp_ordered
            else:
                compare = builder.icmp_signed if kind.signed else builder.icmp_unsigned
            return builder.select(compare(sign, other, one), other, one)

        return kind(first, second), generate

    return chosen


_CHOICES = {min: _chosen("<"), max: _chosen(">")}


class Typing(typing.Context):  # type: ignore[misc]
    """Numba's context of types, in which a call of such a function compiles it for one target."""

    def __init__(self, target: Any, flags: Any) -> None:
        self.__dict__.update(cpu_target.typing_context.__dict__)
        self._target, self._flags = target, flags
        self._parts: dict[Any, Any] = {}

    def resolve_value_type(self, val: Any) -> Any:
        """The type of a constant; `min` and `max` are those of two numbers."""
        return super().resolve_value_type(_CHOICES[val] if val is min or val is max else val)

    def part(self, inlined: _Inlined, args: Any) -> Any:
        """The signature of a function for arguments of these types."""
        key = inlined, args
        if key not in self._parts:
            library = _Part(self._target.codegen(), inlined.function.__qualname__)
            compiled = lower(self, self._target, library, inlined.function, args, None, self._flags)
            self._target.insert_user_function(key, compiled.fndesc, [library])
            self._parts[key] = compiled.signature
        return self._parts[key]

    def forget(self) -> None:
        """Take the functions out of the target again, which all kernels share."""
        for key in self._parts:
            self._target.remove_user_function(key)
        self._parts.clear()
