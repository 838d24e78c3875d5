"""Which images are kept in bf16 between operations, and which of their gradients.

Who reads them would round them anyway, so little is lost but bytes to move; ``keep_half`` tells what is.
"""

from convolt.engines.jit.convolutions import conv_spec, on_tiles
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.kernels.specs import DEPTH
from convolt.engines.jit.kernels.tile_specs import TileSpec
from convolt.engines.jit.plan import Plan


def keep_half(plan: Plan, tensor: Tensor) -> None:
    """Keep images in bf16 between convolutions on tiles, the BatchNorms around them, and dense layers on tiles.

    Convolutions on tiles round what they read anyway: images, whose channels must fill whole tile rows so that tiles
    are read where the images lie, and the gradient of their output; so do dense layers behind a Flatten. What differs:
    what is handed to a BatchNorm, a convolution's output and a gradient, is rounded before the mean goes, an error of
    2^-9 of the mean, not of the deviation from it; a convolution's db is a sum of rounded slopes; and behind a
    LeakyReLU slopes are rounded before they are multiplied as well as after.
    """
    maker, readers = tensor.maker, tensor.readers
    if not (tensor.is_image and readers and maker is not None):
        return
    # The output of a sum's activation is read again on the way back, by its BatchNorm.
    norm = maker.kind == "BatchNorm2d" and maker.outer is None
    rounds = on_tiles(plan, maker) or (norm and plan.units.tiles is not None)
    if rounds and tensor.shape[0] % DEPTH == 0 and all(on_tiles(plan, reader) for reader in readers):
        tensor.half = True
        tensor.half_slope = len(readers) == 1 and _takes_half_slope(plan, maker)
        tensor.behind = max(TileSpec(conv_spec(plan, reader)).behind for reader in readers)
        maker.because("output in bf16: convolutions on tiles alone read it")
    elif rounds and len(readers) == 1 and _flattens_half(tensor, features := readers[0].output):
        tensor.half = True
        tensor.half_slope = features.half_slope = len(features.readers) == 1 and _takes_half_slope(plan, maker)
        maker.because("output in bf16: dense layers on tiles alone read it, flattened")
    elif plan.training and on_tiles(plan, maker) and maker.pool is None and _consumed_by(readers[0], tensor):
        tensor.half = tensor.half_slope = True
        maker.because("output in bf16: a BatchNorm puts its gradient there")


def _takes_half_slope(plan: Plan, maker: Operation) -> bool:
    """Whether its backward pass can read the gradient of its output in bf16."""
    if maker.kind == "BatchNorm2d":
        return not maker.adds
    return conv_spec(plan, maker).windows is None  # slopes that meet in a pixel are added up as they come


def _flattens_half(tensor: Tensor, features: Tensor) -> bool:
    """Whether features are this tensor flattened, in bf16, and pixels as well as channels can be turned in pairs."""
    C, H, W = tensor.shape
    return features.half and features.image is None and not any(tensor.border) and C % 2 == H * W % 2 == 0


def _consumed_by(reader: Operation, tensor: Tensor) -> bool:
    """Whether it is a BatchNorm of this tensor, rather than of another to which this one is added."""
    return reader.inputs[0] is tensor and reader.consumes
