"""Addresses and typed views: how a compiled kernel sees its buffers.

A kernel is a C function ``void kernel(int64_t* arguments, int64_t chunk, int64_t thread)``; `arguments` holds addresses
and scalars as int64. `view` makes a NumPy-like array of an address and a shape: it lives in registers, owns nothing (no
reference counts, so nothing of Numba's runtime in the compiled code) and LLVM sees every stride of a constant shape as
a constant, so plain loops over views vectorize. `address_of` goes the other way, for the micro-kernels, which take
int64 addresses. An example, ReLU of the `chunk`-th image::

    def relu(spec: ReluSpec) -> Callable[..., None]:
        H, W, C = spec.shape

        def kernel(arguments, chunk, thread):
            x = view(arguments[0], (spec.N, H, W, C), np.float32)[chunk]
            y = view(arguments[1] + chunk * (H * W * C * 4), (H, W, C), np.float32)
            for h in range(H): ...

        return kernel

Types decide the width of a vector: an integer literal is an int64, so a loop that writes bytes or compares float32
numbers should select among ``np.uint8(1)`` or ``np.float32(0)``, or it runs at an eighth of its speed.
"""

from itertools import accumulate
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from convolt.engines.jit.inlined import inlined

LINE = 64  # bytes of the cache that are fetched together


@intrinsic
def view(typingctx: Any, address: Any, shape: Any, dtype: Any) -> Any:
    """A C-contiguous array of `dtype` and `shape` (a tuple of integers) over the memory at an int64 `address`."""
    axes = len(shape)
    array = types.Array(dtype.dtype, axes, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(array.dtype)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(element))
        sizes = cgutils.unpack_tuple(builder, args[1], axes)
        sizes = [context.cast(builder, size, kind, types.intp) for size, kind in zip(sizes, shape, strict=True)]
        strides = [itemsize]
        for size in reversed(sizes[1:]):
            strides.insert(0, builder.mul(strides[0], size))
        proxy = arrayobj.make_array(array)(context, builder)
        data = builder.inttoptr(args[0], element.as_pointer())
        arrayobj.populate_array(proxy, data, sizes, strides, itemsize, meminfo=None)
        return proxy._getvalue()

    return array(address, shape, dtype), generate


@intrinsic
def address_of(typingctx: Any, array: Any, index: Any) -> Any:
    """The int64 address of ``array[index]``; `index` is a tuple with one integer (not negative) for each axis."""
    axes = len(index)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        proxy = arrayobj.make_array(array)(context, builder, args[0])
        indices = cgutils.unpack_tuple(builder, args[1], axes)
        address = builder.ptrtoint(proxy.data, ir.IntType(64))
        strides = cgutils.unpack_tuple(builder, proxy.strides, axes)
        for i, kind, stride in zip(indices, index, strides, strict=True):
            address = builder.add(address, builder.mul(context.cast(builder, i, kind, types.int64), stride))
        return address

    if axes != array.ndim:
        return None
    return types.int64(array, index), generate


def _reinterpretation(source: Any, target: Any) -> Any:
    """An intrinsic that reads the bits of a `source` number as a `target` number of the same size."""

    @intrinsic
    def reinterpret(typingctx: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_data_type(target))

        return (target(source), generate) if typingctx.can_convert(bits, source) is not None else None

    return reinterpret


float64_of_bits = _reinterpretation(types.int64, types.float64)  # a scalar argument: lr = float64_of_bits(arguments[3])
float32_of_bits = _reinterpretation(types.uint32, types.float32)
bits_of_float32 = _reinterpretation(types.float32, types.uint32)


def copy(count: int) -> Any:
    """A function for kernels: ``move(source, target)`` copies `count` bytes between addresses, in whole vectors.

    The smallest is 16 bytes: up to 15 behind both ends are read and overwritten.
    """
    whole, rest = divmod(-(-count // 16), 4)
    sizes = [64] * whole + [[], [16], [32], [32, 16]][rest]

    @intrinsic
    def move(typingctx: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for size, start in zip(sizes, accumulate(sizes, initial=0), strict=False):
                kind = ir.VectorType(ir.IntType(8), size).as_pointer()
                offset = ir.Constant(ir.IntType(64), start)
                value = builder.load(builder.inttoptr(builder.add(args[0], offset), kind), align=1)
                builder.store(value, builder.inttoptr(builder.add(args[1], offset), kind), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


def _fetches(intent: int, level: int) -> Any:
    """An intrinsic of LLVM's ``prefetch``: intent is 1 to write, level 3 the nearest cache."""

    @intrinsic
    def fetch(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, word = builder.inttoptr(args[0], ir.IntType(8).as_pointer()), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [pointer, word(intent), word(level), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return fetch


prefetch = _fetches(0, 2)
"""``prefetch(address)``: the cache line there comes into the L2 cache; an address that is nobody's does no harm."""
_claim_line = _fetches(1, 3)


def claim(count: int) -> Any:
    """A function for kernels: ``claim(address)``, of `count` bytes that are about to be written.

    A line that another cache or the L3 cache has is asked for while there is other work; else the stores would wait.
    """

    @inlined
    def ask(address: int) -> None:
        for offset in range(0, count, LINE):
            _claim_line(address + offset)

    return ask


@intrinsic
def hidden(typingctx: Any, count: Any) -> Any:
    """The same int64, which LLVM cannot see: a loop of so many rounds is not unrolled. It costs no instruction."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        return builder.asm(ir.FunctionType(word, [word]), "", "=r,0", [args[0]], side_effect=False)

    return types.int64(types.int64), generate
