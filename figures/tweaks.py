"""Pages of digits with dimensions of their capsules changed."""

import numpy as np
from PIL import Image

from figures import pages


def draw_tweak(images, deltas, dimension, row_names):
    """Draw digits with a dimension of their capsules changed: digits down, steps across.

    For the arguments see `draw_sweep`: images are (digits, steps, H, W, C).
    """
    title = f"Dimension {dimension} of the longest capsule of each image, changed"
    return _draw_steps(title, images, deltas, row_names)


def draw_tweak_overview(images, deltas, class_name, row_names=None):
    """Draw a digit with each dimension of its capsule changed, like figure 4 of the paper.

    For the arguments see `draw_sweep`: images are (dims, steps, H, W, C), and `row_names` are of
    chosen dimensions, None if `images` has all of them.
    """
    which = "Each dimension" if row_names is None else "Chosen dimensions"
    row_names = row_names or [f"dim {i}" for i in range(len(images))]
    title = f"{which} of the capsule of class {class_name}, changed"
    return _draw_steps(title, images, deltas, row_names)


def _draw_steps(title, images, deltas, row_names):
    """Draw images (rows, steps, H, W, C), each column below its delta."""
    note = "the number above each column is added; 0 is the capsule as the network found it"
    above = [signed(delta) for delta in deltas]
    return pages.draw_tiles(title, note, images[None], [()], 1, above, row_names)


def draw_sweep(images, deltas, row_names):
    """Draw digits with each dimension of their capsules changed: a page of half size for each step.

    Args:
        images: (dims, digits, steps, H, W, C).
        deltas: (steps,), what was added to the dimension.
        row_names: class of each digit.

    Returns:
        List of the pixels of each page.
    """
    note = "one column per dimension of the capsule, the other dimensions as the network found them"
    above = [str(dimension) for dimension in range(len(images))]
    drawn = []
    for step, delta in enumerate(deltas):
        title = f"Every dimension of the longest capsules, changed by {signed(delta)}"
        tiles = images[:, :, step].swapaxes(0, 1)  # (dims, digits, ...) -> (digits, dims, ...)
        page = pages.draw_tiles(title, note, tiles[None], [()], 1, above, row_names)
        drawn.append(np.asarray(Image.fromarray(page).reduce(2)))
    return drawn


def signed(number):
    """Return a number with its sign and two digits after the point; zero as "0"."""
    return "0" if abs(number) < 1e-9 else f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")
