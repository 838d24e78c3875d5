"""Functions of a convolution's kernels called one after another."""

from collections.abc import Callable

from convolt.engines.jit.inlined import inlined

Call = Callable[..., None]


@inlined
def _nothing(*addresses: int) -> None:
    pass


def in_turn(functions: tuple[Call, ...]) -> Call:
    """One after another on the same arguments, which are addresses; of none, nothing happens."""
    if not functions:
        return _nothing
    first, rest = functions[0], functions[1:]
    if not rest:
        return first
    others = in_turn(rest)

    @inlined
    def run(*addresses: int) -> None:
        first(*addresses)
        others(*addresses)

    found: Call = run
    return found
