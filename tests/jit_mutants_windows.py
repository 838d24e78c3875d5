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

TWINS, BLOCKS_OF = "winograd, twins, odd sizes, two panels", "winograd, twins, blocks of images"
ONE, DU, SPECS = "1", "product(v, d, du)", "kernels/winograd_specs.py"

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
    # twins
    JitMutant("one twin of columns", WINOGRAD, "def _products(", "j >= lone", "False", TWINS),
    JitMutant("one twin of rows", WINOGRAD, "def _products(", "1 if i < lone_rows else 2", ONE, TWINS),
    JitMutant("its own tile", WINOGRAD, "def _products(", "source.words, TWIN", "0, TWIN", TWINS),
    JitMutant("filters of its twin", WINOGRAD, "def _products(", "TWIN * panels * panel", "panels * panel", TWINS),
    JitMutant("its own row of tiles", WINOGRAD, "def _products(", "conv.together * source.step", "0", TWINS),
    JitMutant("dw of its own row", WINOGRAD, "def _weight_products(", "below * v_row", "0", TWINS),
    JitMutant("dw of its own tile", WINOGRAD, "def _weight_products(", "right * v_tile", "0", TWINS),
    JitMutant("dy of no twin", WINOGRAD, "def _weight_products(", "(i - below * TWIN)", "i", TWINS),
    JitMutant("dw of the first image", WINOGRAD, "def _weight_products(", "b += FLOAT * d_image", "b += 0", BLOCKS_OF),
    JitMutant("dw of the first bundle", WINOGRAD, "def _weights(", "product(v, d, du + FLOAT * part)", DU, TWINS),
    JitMutant("rows further on left out", WINOGRAD, "def _each_row(", "all_rows > rows", "all_rows < rows", TWINS),
    JitMutant("a row of pixels too many", WINOGRAD, "def _each_row(", "(2, 1, -odd)", "(2, 1, 0)", TWINS),
    JitMutant("tiles further on left out", TRANSFORMS, "def _write(", "if spec.further:", "if False:", TWINS),
    JitMutant("wanted by nobody", TRANSFORMS, "def wanted(", "self.high > 0 or i >= rows", "self.high > 0", TWINS),
    JitMutant("the first twin alone", SPECS, "def cut(", "pieces[bundle:] if", "pieces[bundle : bundle + 1] if", TWINS),
    JitMutant("stored image by image", SPECS, "def stores_part(", "self.forward.images == 1", "True", BLOCKS_OF),
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
