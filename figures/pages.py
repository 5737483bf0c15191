"""Pages: images with lines of text around them, below a title and a note.

Pillow draws them; Matplotlib would take five times as long.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from figures.files import DPI
from figures.grids import arrange, enlarge, to_rgb
from utils import printable

INK, FAINT, RED, GREY = "#222222", "#808080", "#c0392b", "#e4e6e8"
# Pixels: line of text, widest head of a row; white between images, between examples, between heads
# and images, and around the page.
LINE, HEAD = 28, 336
SEAM, GAP, PAD, MARGIN = 4, 60, 16, 36


class Text(NamedTuple):
    """A line of text; x and y are pixels from the upper left corner of the page's contents."""

    x: float
    y: float
    text: str
    font: Any
    color: str
    anchor: str  # Pillow's: "lm" starts at x, "mm" has its middle there, "rm" ends there

    def box(self):
        """Return the left, upper, right and lower edge."""
        left, _, right, _ = self.font.getbbox(self.text, anchor=self.anchor)
        return self.x + left, self.y - LINE / 2, self.x + right, self.y + LINE / 2


def _font_file(bold):
    import matplotlib  # for its DejaVu Sans; slow

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path(), "fonts/ttf", name)


@functools.cache
def load_font(points, bold):
    """Return a font of Pillow."""
    return ImageFont.truetype(_font_file(bold), round(points * DPI / 72))


@functools.cache
def _characters():
    """Return the numbers of the characters that the font can draw, also in bold."""
    from matplotlib.ft2font import FT2Font

    return frozenset.intersection(
        *(frozenset(FT2Font(str(_font_file(bold))).get_charmap()) for bold in (False, True))
    )


def is_drawable(text):
    """Return whether the font has all characters of a text."""
    return _characters().issuperset(map(ord, text))


def drawable_names(class_names):
    """Return the names of classes as pictures show them: "#3" if the font lacks a character."""
    return tuple(
        name if is_drawable(name) else f"#{number}" for number, name in enumerate(class_names)
    )


def fit_text(x, y, text, width=math.inf, points=7, bold=False, color=INK, anchor="mm"):
    """Return a Text at most `width` pixels wide: a longer one is set smaller, then cut."""
    text = printable(text)  # file names may have any bytes
    while points > 5 and load_font(points, bold).getlength(text) > width:
        points -= 0.5
    while len(text) > 1 and load_font(points, bold).getlength(text) > width:
        text = text[:-2] + "…"
    return Text(x, y, text, load_font(points, bold), color, anchor)


def draw_page(title, note, pixels, texts):
    """Draw `pixels` (H, W, 3) with `texts` over and around them, below a title and a note.

    The page is as large as the texts need.
    """
    boxes = [(0, 0, pixels.shape[1], pixels.shape[0]), *(text.box() for text in texts)]
    left, top = np.min(boxes, axis=0)[:2]
    heading = [
        fit_text(left, top - 2.5 * LINE, title, points=9, bold=True, anchor="lm"),
        fit_text(left, top - 1.5 * LINE, note, anchor="lm"),
    ]
    boxes += [text.box() for text in heading]
    # Even numbers: `draw_sweep` halves the page, which must not mix neighboring pixels of an image.
    left, top = 2 * np.floor(np.min(boxes, axis=0)[:2] / 2).astype(int) - MARGIN
    right, bottom = 2 * np.ceil(np.max(boxes, axis=0)[2:] / 2).astype(int) + MARGIN

    page = Image.new("RGB", (right - left, bottom - top), "white")
    page.paste(Image.fromarray(pixels), (-left, -top))
    draw = ImageDraw.Draw(page)
    for text in heading + texts:
        place = round(text.x) - left, round(text.y) - top
        draw.text(place, text.text, text.color, text.font, text.anchor)
    return np.asarray(page)


def draw_tiles(title, note, tiles, captions, per_row, above=(), before=(), gap=GAP):
    """Draw examples, each some lines of text above rows of tiles.

    Args:
        title: first line of the page.
        note: second line of the page.
        tiles: images (N, rows, columns, H, W, C), N >= 1.
        captions: the lines (text, color) of each example, as many for each.
        per_row: number of examples side by side.
        above: heads of the tiles' columns.
        before: heads of the tiles' rows.
        gap: pixels between examples side by side.
    """
    tiles = enlarge(to_rgb(tiles))
    columns, height, width = tiles.shape[2:5]
    text_height = len(captions[0]) * LINE
    examples = [arrange(np.concatenate(rows), columns, SEAM, SEAM, color=255) for rows in tiles]
    examples = np.pad(examples, ((0, 0), (text_height, 0), (0, 0), (0, 0)), constant_values=255)
    per_row = min(per_row, len(examples))
    pixels = arrange(examples, per_row, LINE, gap, color=255)

    step_y, step_x = examples.shape[1] + LINE, examples.shape[2] + gap
    texts = []
    for n, lines in enumerate(captions):
        x, y = n % per_row * step_x + examples.shape[2] / 2, n // per_row * step_y + LINE / 2
        for i, (line, color) in enumerate(lines):
            texts.append(fit_text(x, y + i * LINE, line, step_x - 12, color=color))
    for left in range(0, pixels.shape[1], step_x):
        for j, head in enumerate(above):
            x = left + j * (width + SEAM) + width / 2
            texts.append(fit_text(x, -LINE / 2 - 4, head, width, bold=True))
    for top in range(text_height, pixels.shape[0], step_y):
        for i, head in enumerate(before):
            y = top + i * (height + SEAM) + height / 2
            texts.append(fit_text(-PAD, y, head, HEAD, bold=True, anchor="rm"))
    return draw_page(title, note, pixels, texts)
