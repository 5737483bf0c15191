"""What stands for white in images of whole numbers, and how they become bytes."""

import numpy as np

from utils import to_uint8

# Bits, sums of 4×4 bits, bytes, and 10, 12 or 16 bits of a camera.
WHITES = (1, 16, 255, 1023, 4095, 65535)
NAMED_WHITES = "1, 16, 255, 1023, 4095 or 65535"


def white_of(largest, of_bytes=False):
    """Return what stands for white in whole numbers from 0 to `largest`, or None if it is unclear.

    Half of a range has to be in use, except that of bytes if the numbers probably were some.
    """
    if of_bytes and (largest == 0 or 16 < largest < 128):
        return 255
    fitting = (white for white in WHITES if largest <= white)
    white = next(fitting, None)
    if white is None or (white <= 16 and largest < white) or 2 * largest < white:
        return None
    return white


def may_be_dark(largest, white):
    """Return whether some images up to `largest` fit others in which `white` is white."""
    below = max((other for other in WHITES if other < white), default=0)
    return largest == 0 or below < largest <= white


def scaled_to_bytes(images, white):
    """Convert numbers from 0 to `white`, (N, ...) or one image (H, W, C), to uint8."""
    if white == 255:
        return images.astype(np.uint8, copy=False)
    converted = np.empty(images.shape, np.uint8)
    divisor = 1 if white == 1 else np.float64(white)  # whole numbers may be of type float16
    for n in range(0, len(images), 1000):  # in parts: the floats in between take much memory
        converted[n : n + 1000] = to_uint8(images[n : n + 1000] / divisor)
    return converted
