"""Convolutions by the jit engine's Winograd kernels, and first layers whose dw comes from the winners of a pool."""

from engine_cases import Case

from convolt.layers import Conv2d, LeakyReLU, MaxPool2d, ReLU, Residual

WINOGRAD = {
    case.name: case
    for case in (
        Case(
            "winograd, some channels of a vector, max-pool",
            (17, 6, 10),
            (Conv2d(17, 20, 3, padding=1), ReLU(), MaxPool2d(2)),
            5,
        ),
        Case(
            "winograd, blocks of whole images",
            (16, 4, 4),
            (Conv2d(16, 20, 3, padding=1, bias=False), LeakyReLU(0.1)),
            37,
        ),
        Case(
            "winograd, two panels, padding 2 and none",
            (16, 8, 6),
            (Conv2d(16, 70, 3, padding=2), ReLU(), Conv2d(70, 16, 3)),
            2,
        ),
        Case(
            "winograd, dx added",
            (16, 24, 24),
            (Residual((Conv2d(16, 16, 3, padding=1), ReLU(), Conv2d(16, 16, 3, padding=1))), ReLU()),
            2,
        ),
        Case("winograd, a filter in pieces", (17, 7, 10), (Conv2d(17, 20, 5, padding=2), ReLU(), MaxPool2d(2)), 5),
        Case("winograd, odd sizes", (16, 5, 7), (Conv2d(16, 20, 3, padding=1), LeakyReLU(0.1)), 37),
        Case(
            "winograd, pieces of two, odd sizes, dx added",
            (16, 9, 7),
            (Residual((Conv2d(16, 16, (5, 7), padding=(2, 3), bias=False),)), ReLU()),
            3,
        ),
        Case("winograd, twins, blocks of images", (16, 5, 7), (Conv2d(16, 20, 4, padding=2), LeakyReLU(0.1)), 21),
        Case("winograd, twins, bands", (16, 18, 34), (Conv2d(16, 18, 7, padding=3), ReLU(), MaxPool2d(2)), 3),
        Case("winograd, twins, odd sizes, two panels", (17, 9, 12), (Conv2d(17, 70, (7, 4), padding=(3, 1)),), 3),
        Case(
            "winograd, twins of one axis, dx added",
            (16, 12, 14),
            (Residual((Conv2d(16, 16, (7, 3), padding=(3, 1)), ReLU(), Conv2d(16, 16, (5, 7), padding=(2, 3)))),),
            2,
        ),
        Case("winograd, twins, dilation", (18, 8, 9), (Conv2d(18, 16, (4, 2), padding=3, dilation=(2, 3)), ReLU()), 5),
        Case(
            "winograd, dilation",
            (18, 8, 9),
            (Conv2d(18, 16, (3, 2), padding=(2, 3), dilation=(2, 3)), ReLU()),
            5,
        ),
    )
}

# Alone, they are models whose images need no gradient: dw from the pixels that won the pool.
POOLED_FIRST = {
    case.name: case
    for case in (
        Case("winners, one channel 5x5", (1, 10, 12), (Conv2d(1, 32, 5, padding=2), ReLU(), MaxPool2d(2)), 5),
        Case("winners, an odd size", (3, 9, 8), (Conv2d(3, 17, 5, padding=1, bias=False), MaxPool2d(2)), 3),
    )
}
