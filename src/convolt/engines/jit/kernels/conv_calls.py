"""Functions of a convolution's kernels called one after another."""

from collections.abc import Callable

from convolt.engines.jit.inlined import inlined

Call = Callable[..., None]


@inlined
def _nothing(*addresses: int) -> None:
    pass


def in_turn(functions: tuple[Call, ...]) -> Call:
    """One after another on the same arguments, which are addresses; of none, nothing happens."""
    if len(functions) == 1:
        return functions[0]
    first, others = (functions[0], in_turn(functions[1:])) if functions else (_nothing, _nothing)

    @inlined
    def run(*addresses: int) -> None:
        first(*addresses)
        others(*addresses)

    found: Call = run
    return found
