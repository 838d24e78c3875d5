"""Mistakes in what keeps images in bf16, and in kernels on tiles that came with it."""

from jit_mutant import JitMutant

TILED, SHIFTED, TILE_SPECS = "kernels/tiles.py", "kernels/tiles_shifted.py", "kernels/tile_specs.py"
NORM, ROWS, EPILOGUE, PLANNER = "kernels/normalization.py", "batchnorm.py", "epilogue.py", "half.py"
PLANES, BACKWARD, NUMBERS = "kernels/planes.py", "kernels/tiles_backward.py", "bf16.py"
DIRECT, GATHERED, STRIDE, MAXIMUM = "direct rows", "gathered rows", "output of a stride", "norm and maximum"
LINEAR, BEHIND_PLANES, TWO = "norms without activation", "norm behind planes", "norm with two readers"
OVERLAP, UNEVEN, FLAT = "windows that overlap", "an odd number of pixels", "flattened"
ODD_POOL = "planes in groups of rows, odd pool"
IMAGES, DENSE = "kernels/images.py", "kernels/dense_tiles.py"
GROUPS = "two groups of images, the last with fewer"
POOL, ON_PLANES, AS_ONE = "half_pool.py", "wide filter on planes", "groups as one"

HALF = (
    # what is kept
    JitMutant("a gradient that is added", PLANNER, "def keep_half", "len(readers) == 1 and _takes", "_takes", TWO),
    JitMutant(
        "the output of a sum's activation",
        PLANNER,
        "def keep_half",
        " and maker.outer is None",
        "",
        "residual of norms",
    ),
    JitMutant(
        "a max-pool's gradient",
        PLANNER,
        "def keep_half",
        "maker.pool is None and ",
        "",
        "norm of windows that overlap",
    ),
    JitMutant(
        "the other branch of a sum",
        PLANNER,
        "def _consumed_by",
        "reader.inputs[0] is tensor and ",
        "",
        "a branch without norm",
    ),
    JitMutant(
        "slopes of windows that overlap", PLANNER, "def _takes_half_slope", ".windows is None", " is not None", OVERLAP
    ),
    JitMutant("an odd number of pixels in pairs", PLANNER, "def _flattens_half", " == H * W % 2 == 0", " == 0", UNEVEN),
    # between convolutions and dense layers
    JitMutant(
        "features apart", IMAGES, "def flatten(", "+ number * image * features", "+ FLOAT * image * features", FLAT
    ),
    JitMutant("slopes of features apart", IMAGES, "def flatten_backward", "number * image", "FLOAT * image", FLAT),
    JitMutant(
        "dx of 32 samples",
        DENSE,
        "def _rounded_product",
        "WIDE, c + BF16 * (first + row) * inputs",
        "WIDE, c + BF16 * row * inputs",
        FLAT,
    ),
    JitMutant("the last samples' dx left out", DENSE, "def _rounded_product", "elif rest:", "elif rest < 0:", FLAT),
    JitMutant(
        "the neighbor's channels",
        EPILOGUE,
        "def pair_through",
        "I64(pixel * spec.channels)",
        "I64(pixel)",
        BEHIND_PLANES,
    ),
    JitMutant(
        "half of a pair added to what was there",
        EPILOGUE,
        "def _store_half",
        "builder.and_(before, builder.not_(mask))",
        "before",
        ODD_POOL,
    ),
    # images
    JitMutant(
        "rows behind the last",
        TILED,
        "def multiply_group",
        "range(0, min(rows, P - p), rows_a_call)",
        "range(0, rows, rows_a_call)",
        "rows behind the last pool",
    ),
    JitMutant(
        "pooled pixels apart", TILED, "def finish_group", "target + number * q * K", "target + FLOAT * q * K", GATHERED
    ),
    JitMutant(
        "rows apart",
        TILED,
        "def finish_group",
        "number * (image * y_size + y_origin + (p + i)",
        "FLOAT * (image * y_size + y_origin + (p + i)",
        STRIDE,
    ),
    JitMutant(
        "images of a group in one place",
        TILED,
        "def conv_forward",
        "picture + (image - first) * picture_bytes",
        "picture",
        GATHERED,
    ),
    JitMutant(
        "columns of the first image",
        BACKWARD,
        "def conv_backward",
        "picture + (image - first) * picture_bytes",
        "picture",
        "a stride of few pixels",
    ),
    JitMutant("pairs of float32", SHIFTED, "def _pairs", "source_of(x.half)", '"fp32"', DIRECT),
    JitMutant(
        "the lower half twice", NUMBERS, "def pack_pairs", "_interleaved(number * TILE)", "_interleaved(0)", DIRECT
    ),
    JitMutant(
        "y of a rectifier as float32",
        EPILOGUE,
        "def through",
        "floats.at(output, offset), source_of(spec.half_y)",
        'floats.at(output, offset), "fp32"',
        STRIDE,
    ),
    JitMutant(
        "y of planes as float32",
        EPILOGUE,
        "def pair_through",
        "floats.at(output, place), source_of(spec.half_y)",
        'floats.at(output, place), "fp32"',
        DIRECT,
    ),
    # BatchNorm
    JitMutant("the pivot's bits", NORM, "def statistics", "float32_of_bf16(view", "np.float32(view", LINEAR),
    JitMutant("slopes apart", NORM, "def slopes", "dy_number * (place", "FLOAT * (place", MAXIMUM),
    JitMutant("dx apart", NORM, "def normalize_backward", "dx_number * place", "FLOAT * place", MAXIMUM),
    JitMutant("dx in float32", ROWS, "def backward", "numbers if spec.half_dx", "numbers if False", LINEAR),
    JitMutant("y in float32", ROWS, "def apply", "numbers if spec.y.half", "numbers if False", MAXIMUM),
    JitMutant(
        "slopes of planes apart",
        PLANES,
        "def _slopes",
        "dy = arguments[3] + dy_number *",
        "dy = arguments[3] + FLOAT *",
        BEHIND_PLANES,
    ),
    JitMutant(
        "dx of images apart", SHIFTED, "def conv_backward", "dx_number * image * bare", "FLOAT * image * bare", MAXIMUM
    ),
    # tiles
    JitMutant(
        "channels of the wrong filter",
        TILED,
        "def pack",
        "(taps, K * taps) if back",
        "(taps, taps) if back",
        "whole tiles",
    ),
    JitMutant(
        "sums that always begin",
        "pair_products.py",
        "def _strip",
        'builder.icmp_unsigned("==", bias',
        'builder.icmp_unsigned("!=", bias',
        GROUPS,
        unit="fma",
    ),
    JitMutant(
        "sums that never begin",
        "amx.py",
        "def _multiply(",
        'icmp_signed("!=", begin',
        'icmp_signed("==", begin',
        GROUPS,
        unit="amx",
    ),
    JitMutant(
        "second copy from the first pixel",
        SHIFTED,
        "def _pairs",
        "odd(image + number * C,",
        "odd(image,",
        "whole tiles",
    ),
    JitMutant(
        "filters of the first residue",
        BACKWARD,
        "def _residue",
        "filters + before",
        "filters",
        "few channels, wide filter, stride 2",
    ),
    JitMutant(
        "pixels that no tap meets",
        BACKWARD,
        "def conv_backward",
        "gaps = conv.wants_dx and",
        "gaps = False and",
        "1x1, stride 2",
    ),
    JitMutant("columns behind a row not cleared", SHIFTED, "def _cleared", "range(rows)", "range(0)", DIRECT),
    JitMutant("rows below not cleared", SHIFTED, "def _cleared", "(image_bytes - below,)", "(0,)", DIRECT),
    JitMutant("nothing cleared behind", SHIFTED, "def _cleared", "(slopes_bytes - behind,)", "(0,)", DIRECT),
    JitMutant(
        "zeros before dy left out",
        SHIFTED,
        "def _cleared",
        "view(scratch, (lead_bytes,), np.uint8)[:] = np.uint8(0)",
        "pass",
        DIRECT,
    ),
    JitMutant("a part of no images", SHIFTED, "def conv_backward", "if last <= chunk * images:", "if False:", DIRECT),
    # pools on integers, and the bias in the products
    JitMutant("the neighbor's window", POOL, "def half_pool", "I64(spec.step)", "I64(spec.pixel)", FLAT, unit="amx"),
    JitMutant(
        "the first tap always wins",
        POOL,
        "def half_pool",
        "number_of(wide, tap), winner",
        "number_of(wide, 0), winner",
        FLAT,
        unit="amx",
    ),
    JitMutant("no bias before the pool", TILED, "def product", 'start="bias" if', 'start="zero" if', FLAT, unit="amx"),
    JitMutant(
        "three times the bias", TILED, "def pack", "rest -= float32_of_bf16(bits)", "rest -= np.float32(0)", ON_PLANES
    ),
    JitMutant("no ones behind the taps", "runs.py", "def _ones", "[I16(ONE)]", "[I16(0)]", ON_PLANES),
    # groups as one
    JitMutant(
        "filters of every group",
        "kernels/weights.py",
        "def spread_groups(",
        "group == k // (K // groups)",
        "group < groups",
        AS_ONE,
    ),
    JitMutant(
        "filters of a group less", "kernels/weights.py", "def spread_groups(", "1) * run, K)", "1) * run, 9)", AS_ONE
    ),
    JitMutant("dw of the first group", BACKWARD, "def reduce_parts(", "begin = k // filters * C", "begin = 0", AS_ONE),
    JitMutant("groups apart", "convolutions.py", "def conv_on_tiles(", "spec.K // groups,", "spec.K,", AS_ONE),
)
