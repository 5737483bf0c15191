"""Images in rows and columns."""

import math

import numpy as np

from utils import to_uint8

TILE = 112  # pixels: about the side of an enlarged image (28 * 4)


def arrange(images, columns, below, beside, color):
    """Lay out images (N, H, W, C) row by row, with seams of a color between them."""
    rows = math.ceil(len(images) / columns)
    paddings = (0, rows * columns - len(images)), (0, below), (0, beside), (0, 0)
    tiles = np.pad(images, paddings, constant_values=color)
    _, height, width, channels = tiles.shape
    tiles = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    page = tiles.reshape(rows * height, columns * width, channels)
    return page[: rows * height - below, : columns * width - beside]


def draw_grid(images):
    """Draw images (B, H, W, C) row by row in ceil(sqrt(B)) columns, enlarged by 3, grey between.

    B >= 1; the images are uint8 or floats in [0, 1]. Unused cells are grey.
    """
    columns = math.ceil(math.sqrt(len(images)))
    return arrange(to_rgb(images), columns, 1, 1, color=128).repeat(3, 0).repeat(3, 1)


def overlay_digits(images):
    """Overlay the reconstructed digits of each image: (N, K, H, W, C) -> (N, H, W, C)."""
    return np.minimum(np.sum(images, axis=1), 1)


def to_rgb(images):
    """Return images (..., H, W, C) as uint8 (..., H, W, 3).

    Of two channels the first is shown, of more than three the first three.
    """
    images = to_uint8(images)
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def enlarge(tiles):
    """Enlarge small tiles (..., H, W, C) by a whole number."""
    scale = max(1, TILE // max(tiles.shape[-3:-1]))
    return tiles.repeat(scale, -3).repeat(scale, -2)
