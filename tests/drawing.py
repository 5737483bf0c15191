"""What the tests of pictures share: pages with their texts, images to draw, and where they are."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from PIL import ImageColor

from figures import pages

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker")
CLOTHES += ("Bag", "Ankle boot")
INK, RED, GREY = (34, 34, 34), (192, 57, 43), (228, 230, 232)
LINE, SEAM, GAP = 28, 4, 60  # pixels: line of text, between images, between examples


class Page(NamedTuple):
    """What `pages.draw_page` got, and the pixels that it returned."""

    title: str
    note: str
    contents: np.ndarray
    texts: list
    pixels: np.ndarray


def pages_of(draw, *args):
    """Call a function that draws pages; return these."""
    drawn, draw_page = [], pages.draw_page

    def spy(*page):
        drawn.append(Page(*page, draw_page(*page)))
        return drawn[-1].pixels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "draw_page", spy)
        draw(*args)
    return drawn


def page_of(draw, *args):
    """Call a function that draws one page; return it."""
    (page,) = pages_of(draw, *args)
    return page


def reconstructed(canvas, with_label, without_label, predictions):
    """What `draw_reconstructions` reads of a network's outputs."""
    return SimpleNamespace(
        canvas=canvas,
        with_label=with_label,
        without_label=without_label,
        predictions=predictions,
    )


def noise(*shape, seed=0):
    """Different images of these numbers: (*shape, 28, 28, 1) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 28, 28, 1), np.uint8)


def white_with(tiles):
    """Return white pixels with tiles, a dict by (y, x), enlarged to 112 pixels."""
    tiles = {
        place: np.broadcast_to(tile, (*tile.shape[:2], 3)).repeat(112 // len(tile), 0)
        for place, tile in tiles.items()
    }
    tiles = {place: tile.repeat(112 // tile.shape[1], 1) for place, tile in tiles.items()}
    canvas = np.full((*(1 + max(edge) + 111 for edge in zip(*tiles, strict=True)), 3), 255)
    for (y, x), tile in tiles.items():
        canvas[y : y + 112, x : x + 112] = tile
    return canvas


def has(picture, color):
    return bool((picture == color).all(-1).any())


def margins_are_white(picture):
    edges = picture[:20], picture[-20:], picture[:, :20], picture[:, -20:]
    return all((edge == 255).all() for edge in edges)


def origin(page):
    """Return (y, x) of the contents in the page, found by their last row: no text is over it."""
    needle = page.contents[-1].tobytes()
    for y in reversed(range(len(page.pixels))):
        start = page.pixels[y].tobytes().find(needle)
        if start >= 0 and start % 3 == 0:
            return y + 1 - len(page.contents), start // 3
    return None


def lines_above(page, y, x, width, lines):
    """Return the (text, color) of so many lines that are centered above a block at (y, x)."""
    above = [
        text
        for text in page.texts
        if abs(text.x - (x + width / 2)) < 1 and y - lines * LINE < text.y < y
    ]
    return [(text.text, ImageColor.getrgb(text.color)) for text in sorted(above, key=lambda t: t.y)]


def column_heads(page, x):
    """Return the texts above the contents whose middle is at x."""
    return [text.text for text in page.texts if text.y < 0 and abs(text.x - x) < 1]


def row_heads(page, y):
    """Return the texts before the contents whose middle is at y."""
    return [text.text for text in page.texts if text.x < 0 and abs(text.y - y) < 1]
