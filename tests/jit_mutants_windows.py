"""Mistakes in Winograd's algorithm for filters of other sizes, and in pools whose windows overlap."""

from jit_mutant import JitMutant

FILTERING, TRANSFORMS, WINOGRAD = "filtering.py", "winograd.py", "kernels/winograd.py"
ROWS, POOLING, TILES, PLANES = "kernels/conv_rows.py", "kernels/pooling.py", "kernels/tiles.py", "kernels/planes.py"
PIECES, ODD, DILATED = "winograd, a filter in pieces", "winograd, odd sizes", "winograd, dilation"
FEW, BLOCKS, IMAGES, TOGETHER = (
    "pool, few channels",
    "pool, two blocks of filters",
    "pool, winograd",
    "pool, images together",
)

WINDOWS = (
    # filters in pieces
    JitMutant("a sign of B", FILTERING, "class Two", "fsub(x[2], x[1])", "fsub(x[1], x[2])", PIECES),
    JitMutant("a sign of A", FILTERING, "class Two", "fadd(m[1], m[2])", "fsub(m[1], m[2])", PIECES),
    JitMutant("a sign of G", FILTERING, "class Two", "fadd(w[0], w[1])", "fsub(w[0], w[1])", PIECES),
    JitMutant("pixels of the first piece", FILTERING, "class Axis", "x[first:]", "x[0:]", PIECES),
    JitMutant(
        "outputs of the first piece", FILTERING, "class Axis", "for other in others:", "for other in []:", PIECES
    ),
    JitMutant(
        "taps that a piece has before it",
        "kernels/winograd_specs.py",
        "def cut(",
        "(3 * threes + 2 * i, 2)",
        "(2 * i, 2)",
        PIECES,
    ),
    # odd sizes, dilations
    JitMutant("no half tile", TRANSFORMS, "def output_tiles(", "if spec.width % 2:", "if False:", ODD),
    JitMutant("no half tile of x", TRANSFORMS, "def _write(", "        if half:\n", "        if half < 0:\n", ODD),
    JitMutant("a row of no pixels", WINOGRAD, "def _outputs(", "if odd and h == last:", "if odd and h < 0:", ODD),
    JitMutant("residues apart by a number", WINOGRAD, "def _residue(", "% wide * C", "% wide", DILATED),
    JitMutant("columns not dilated", WINOGRAD, "def _row(", "window.dilation_w * C", "C", DILATED),
    JitMutant(
        "the last residue alone", "kernels/winograd_specs.py", "def one_block(", "self.residues == 1", "True", DILATED
    ),
    # pools whose windows overlap
    JitMutant("another row kept", ROWS, "def pooled_rows(", "kept[i + stride * line]", "kept[i + line]", FEW),
    JitMutant("rows above the image", ROWS, "def _pool_rows(", "max(0, padding - p * stride)", "0", BLOCKS),
    JitMutant("the last slope alone", POOLING, "def _to_winner(", "place), adds=True", "place), adds=False", FEW),
    JitMutant("a dead winner", POOLING, "def _largest(", "floats, DEAD, codes", "floats, 0, codes", FEW),
    JitMutant("db of the dead", POOLING, "def _to_winner(", "if spec.relu else", "if False else", FEW),
    JitMutant("slopes of the image before", POOLING, "def unpool_image(", "np.float32(0)", "np.float32(1)", FEW),
    JitMutant("codes of the first image", POOLING, "def pool_image(", "code + image * codes", "code", IMAGES),
    JitMutant("nothing pooled", WINOGRAD, "def forward(", "first + image)", "first)", IMAGES),
    JitMutant(
        "another image's place", TILES, "def conv_forward(", "own + unpooled_at + (", "own + unpooled_at - (", TOGETHER
    ),
    JitMutant(
        "images that are not there",
        "kernels/tiles_shifted.py",
        "def conv_backward(",
        "min(together, max(0, last - chunk * images))",
        "together",
        TOGETHER,
    ),
    JitMutant("slopes of another image", PLANES, "def conv_backward(", "0 if windows else image", "image", FEW),
)
