"""Mistakes in convolutions by dot products of bf16 pairs."""

from functools import partial

from jit_mutant import JitMutant

PairMutant = partial(JitMutant, unit="dot")
GEMM, TAPS, TRANSFORMS, PACKING = "gemm.py", "kernels/pairs.py", "winograd.py", "kernels/weights.py"
SPECS, WINOGRAD_SPECS, RESIDUES = "kernels/specs.py", "kernels/winograd_specs.py", "kernels/residues.py"
ODD, STRIDED, NINE = (
    "an odd width, channels that fill no tile",
    "few channels, wide filter, stride 2",
    "direct rows in pairs, stride 2",
)
SOME, KERNELS = "some images at a time", "kernels/winograd.py"
TILED, PANELS, ODD_TILES = "tiles in pairs", "two panels, padding 2", "an odd number of channels"

PAIRS = (
    PairMutant(
        "what lies behind x",
        TAPS,
        "def rounded",
        "view(y + BF16 * count, (1,), np.uint16)[:] = np.uint16(0)",
        "pass",
        STRIDED,
    ),
    PairMutant(
        "dy not rounded for the image",
        "kernels/conv.py",
        "def _input_gradients",
        "ready(dy, dy + FLOAT * place)",
        "pass",
        "groups of odd filters",
    ),
    PairMutant(
        "the pixel a column further",
        TAPS,
        "def pixel_pairs",
        "spec.window.stride_w * spec.x.C",
        "spec.x.C",
        STRIDED,
    ),
    PairMutant("an odd row's end", TAPS, "def pixel_pairs", "if whole < depth:", "if False:", ODD, quick=True),
    PairMutant(
        "the end of x",
        TAPS,
        "def pixel_pairs",
        "last_inputs(x + FLOAT * both, target + FLOAT * both)",
        "pass",
        "100 channels of a pixel",
    ),
    PairMutant(
        "rows of taps close together",
        RESIDUES,
        "def packed_taps",
        "begin += conv.depth * conv.together",
        "begin += conv.segment_taps * conv.channels",
        STRIDED,
    ),
    PairMutant("half a pair left out", SPECS, "def depth(", "-(-self.segment_taps", "(self.segment_taps", STRIDED),
    PairMutant("sides counted by tap", PACKING, "def pack", "(begin + c) % together", "c % together", STRIDED),
    PairMutant(
        "sides of turned filters",
        PACKING,
        "def pack",
        "(begin + k) % together",
        "k % together",
        "some images at a time",
    ),
    PairMutant("nine columns in half a vector", GEMM, "def _vectors", "WIDEST // 2\n", "WIDEST // 2 + 1\n", NINE),
    PairMutant("strides of pairs", GEMM, "def a_number", "2 if self.pairs", "4 if self.pairs", ODD),
    PairMutant(
        "every pixel of a pair",
        "kernels/conv.py",
        "def _weight_product",
        "together * spec.together * window",
        "together * window",
        ODD,
    ),
    PairMutant("one tile twice", TRANSFORMS, "def _write", "builder.add(left, I64(1))", "left", TILED),
    PairMutant("an odd tile", TRANSFORMS, "def _write", "elif single or half:", "elif False:", TILED),
    PairMutant(
        "planes of half words", TRANSFORMS, "def _write", "(2 if halves else 1)", "1", "tiles of a residual branch"
    ),
    PairMutant("no odd tile", WINOGRAD_SPECS, "class Planes", "-(-tiling.wide // 2)", "tiling.wide // 2", TILED),
    PairMutant(
        "tiles of one channel less",
        KERNELS,
        "def _weight_products",
        "conv.together, conv.together * C",
        "conv.together, C",
        PANELS,
    ),
    PairMutant("one side of a pair", TRANSFORMS, "def filter_tiles", "transformed(other)", "transformed(w)", PANELS),
    PairMutant(
        "pairs of an odd number", "convolutions.py", "def _unpaired", "spec.x.C % 2 or spec.K % 2", "False", ODD_TILES
    ),
)
