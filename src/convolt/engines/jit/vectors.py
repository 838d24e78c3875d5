"""The few LLVM idioms that every micro-kernel is made of: vectors in memory, constants, carried loops.

Numba's `@intrinsic` hands over an `llvmlite` IR builder. LLVM's vectors are generic: 16, 8 or 4 lanes lower to AVX-512,
AVX2 or NEON registers. A value carried round a loop is a phi node, which LLVM keeps in a register; the same value in
memory would be loaded and stored at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

F32, I1, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
BYTES = I8.as_pointer()


def declare(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """The LLVM intrinsic or function of this name, declared once in a module."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def carried_loop(
    builder: Any, count: Any, start: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """``for i in range(count): values = body(i, values)`` with `values` in registers; returns the last `values`."""
    entry = builder.block
    head, inside, done = (builder.append_basic_block(name) for name in ("head", "inside", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(I64(0), entry)
    held = [builder.phi(value.type) for value in start]
    for phi, value in zip(held, start, strict=True):
        phi.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", i, count), inside, done)
    builder.position_at_end(inside)
    following = body(i, held)
    i.add_incoming(builder.add(i, I64(1)), builder.block)
    for phi, value in zip(held, following, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return held


def for_vectors(builder: Any, count: int, lanes: int, each: Callable[[Any, int], None]) -> None:
    """``each(offset, used)`` for the vectors of `count` numbers; the last one may be used in part."""
    whole, rest = divmod(count, lanes)

    def step(i: Any, nothing: list[Any]) -> list[Any]:
        each(builder.mul(i, I64(lanes)), lanes)
        return []

    carried_loop(builder, I64(whole), [], step)
    if rest:
        each(I64(whole * lanes), rest)


@dataclass(frozen=True)
class Floats:
    """Vectors of `lanes` float32 numbers."""

    builder: Any
    lanes: int

    @property
    def type(self) -> Any:
        return ir.VectorType(F32, self.lanes)

    @property
    def zero(self) -> Any:
        return ir.Constant(self.type, [0.0] * self.lanes)

    def constant(self, value: float) -> Any:
        """The same number in every lane."""
        return ir.Constant(self.type, [F32(value)] * self.lanes)

    def pointer(self, address: Any) -> Any:
        """An int64 address as a pointer to float32."""
        return self.builder.inttoptr(address, F32.as_pointer())

    def at(self, pointer: Any, *offset: Any) -> Any:
        """The pointer `offset` elements further: constants and at most one value."""
        for part in offset:
            pointer = self.builder.gep(pointer, [I64(part) if isinstance(part, int) else part])
        return pointer

    def broadcast(self, pointer: Any, align: int = 4) -> Any:
        """The 32 bits at `pointer`, a multiple of `align` bytes, in every lane."""
        undefined = ir.Constant(self.type, ir.Undefined)
        number = self.builder.load(self.builder.bitcast(pointer, F32.as_pointer()))
        number.align = align
        lane = self.builder.insert_element(undefined, number, I32(0))
        return self.builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(I32, self.lanes), None))

    def collect(self, pointers: Sequence[Any]) -> Any:
        """The number at each of as many pointers as there are lanes."""
        value = ir.Constant(self.type, ir.Undefined)
        for lane, pointer in enumerate(pointers):
            value = self.builder.insert_element(value, self.builder.load(pointer), I32(lane))
        return value

    def low_half(self, x: Any) -> Any:
        """The first half of its lanes."""
        lanes = ir.Constant(ir.VectorType(I32, self.lanes // 2), [I32(i) for i in range(self.lanes // 2)])
        return self.builder.shuffle_vector(x, x, lanes)

    def load(self, pointer: Any, used: int | None = None) -> Any:
        """The vector of float32 at `pointer`; from lane `used` on it is zero and its memory is not touched."""
        return self.load_as(F32, pointer, self.lanes if used is None else used)

    def load_as(self, element: Any, pointer: Any, used: int) -> Any:
        """The first `used` lanes of a vector of `element`, zero in the others."""
        kind = ir.VectorType(element, self.lanes)
        pointer = self.builder.bitcast(pointer, kind.as_pointer())
        if used == self.lanes:
            value = self.builder.load(pointer)
            value.align = _size(element)
            return value
        name = f"llvm.masked.load.v{self.lanes}{_suffix(element)}.p0"
        function = declare(self.builder, name, kind, [pointer.type, I32, ir.VectorType(I1, self.lanes), kind])
        return self.builder.call(function, [pointer, I32(_size(element)), self._first(used), ir.Constant(kind, None)])

    def store(self, value: Any, pointer: Any, used: int | None = None) -> None:
        """Store the first `used` lanes of `value` (of any element type), all of them by default."""
        element = value.type.element
        if used == 1:  # of a vector cut down to 16 bits LLVM 22 would write 32
            first = self.builder.extract_element(value, I32(0))
            self.builder.store(first, self.builder.bitcast(pointer, element.as_pointer())).align = _size(element)
            return
        pointer = self.builder.bitcast(pointer, value.type.as_pointer())
        if used is None or used == self.lanes:
            self.builder.store(value, pointer).align = _size(element)
            return
        name = f"llvm.masked.store.v{self.lanes}{_suffix(element)}.p0"
        mask = ir.VectorType(I1, self.lanes)
        function = declare(self.builder, name, ir.VoidType(), [value.type, pointer.type, I32, mask])
        self.builder.call(function, [value, pointer, I32(_size(element)), self._first(used)])

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """``x * y + z``, fused where the CPU can: `llvm.fma` would call libm where it cannot."""
        function = declare(self.builder, f"llvm.fmuladd.v{self.lanes}f32", self.type, [self.type] * 3)
        return self.builder.call(function, [x, y, z])

    def order_loads(self) -> None:
        """Keep loads on their side of this point. It costs no instruction.

        Neighboring pixels share their taps, so LLVM would keep what it loaded for the next steps, in registers that
        the sums need, and spill.
        """
        self.builder.fence("acq_rel", targetscope="singlethread")

    def relu(self, x: Any) -> Any:
        """``max(x, 0)``; a NaN stays one."""
        return self.builder.select(self.builder.fcmp_ordered("<", x, self.zero), self.zero, x)

    def sums(self, vectors: Sequence[Any]) -> Any:
        """The sum over the lanes of each of at most `lanes` vectors, in the first lanes of one.

        Two vectors are folded into one that holds half as many partial sums of each, until the lanes are used up:
        log2(lanes) additions deep, always in the same order.
        """
        parts, width = list(vectors), self.lanes
        while width > 1:
            width //= 2
            starts = range(0, self.lanes, 2 * width)
            kept = [start + i for start in starts for i in range(width)]
            pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
            parts = [self._folded(pair[0], pair[-1], kept, width) for pair in pairs]
        return parts[0]

    def _folded(self, x: Any, y: Any, kept: Sequence[int], width: int) -> Any:
        lanes = [*kept, *(self.lanes + i for i in kept)]
        low, high = (
            self.builder.shuffle_vector(
                x, y, ir.Constant(ir.VectorType(I32, self.lanes), [I32(i + far) for i in lanes])
            )
            for far in (0, width)
        )
        return self.builder.fadd(low, high)

    def _first(self, used: int) -> Any:
        return ir.Constant(ir.VectorType(I1, self.lanes), [I1(i < used) for i in range(self.lanes)])


def _size(element: Any) -> int:
    """Bytes."""
    return 4 if element == F32 else int(element.width) // 8


def _suffix(element: Any) -> str:
    """How LLVM spells the type in the name of an intrinsic."""
    return "f32" if element == F32 else f"i{element.width}"


def joined(builder: Any, pieces: Sequence[Any]) -> Any:
    """Vectors one behind another, a power of two of them, as one."""
    found = list(pieces)
    while len(found) > 1:
        lanes = 2 * found[0].type.count
        order = ir.Constant(ir.VectorType(I32, lanes), [I32(lane) for lane in range(lanes)])
        found = [builder.shuffle_vector(*found[i : i + 2], order) for i in range(0, len(found), 2)]
    return found[0]


def transposed(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """The transpose of a square, whose rows are a power of two; in longer rows, of each of the squares side by side.

    Interleaving the first half of the rows with the second, log2(rows) times, brings every element to its place.
    """
    size, lanes = len(rows), rows[0].type.count
    orders = []
    for start in (0, size // 2):
        taken = [square + i for square in range(start, lanes, size) for i in range(size // 2)]
        order = [I32(lane) for i in taken for lane in (i, lanes + i)]
        orders.append(ir.Constant(ir.VectorType(I32, lanes), order))
    result, held = list(rows), 1
    while held < size:
        pairs = zip(result[: size // 2], result[size // 2 :], strict=True)
        result = [builder.shuffle_vector(x, y, order) for x, y in pairs for order in orders]
        held *= 2
    return result
