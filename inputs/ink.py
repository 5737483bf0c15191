"""Take ink off its paper and place it the way a data set places its own.

MNIST's digits were cropped, scaled into a box of 20×20 pixels and centred by their mass on 28×28,
light on an even dark background. A network trained on them recognizes a photograph or a scan only
if that is done to it too. How a data set places its ink is measured from its training images.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from utils import edge_pixels, evenly

WORKING_SIZE = 400  # pixels of the longer side at which ink is looked for
MARGIN = 0.25  # share of the ink's longer side that is kept around it for a closer look
MIN_CONTRAST = 12 / 255  # contrast of ink and paper; less is no ink
WINDOW = 0.4  # share of the longer side: strokes narrower than this are not part of the paper
MIN_AREA = 6  # pixels; less is noise, even on a blank page
SPECK = 0.04  # share of the largest part's ink; less is a speck
VISIBLE = 0.2  # share of the ink's contrast at which its bounding box ends
MIN_IMAGES = 10  # that show a style
MAX_STROKE = 0.25  # share of the box; wider than this, the items of a data set are not strokes


class InkStyle(NamedTuple):
    """How a data set places ink on its background."""

    light_ink: bool  # on a dark background; else dark ink on a light one
    box: int  # pixels of the longer side of the ink
    by_mass: bool  # whether the centre of mass is in one place, or that of the bounding box
    offset: tuple[float, float]  # how far below and right of the image's middle that place is
    stroke: float  # typical width of a stroke, pixels
    tolerance: float = 1.0  # pixels that the box and the place of an image may differ by


# --- How a data set places its ink ----------------------------------------------------------------


def measure_style(images):
    """Return the InkStyle of images, uint8 (N, H, W, C), that show ink on an even background.

    None if the images are of another kind, such as photographs or clothes.
    """
    if images.shape[-1] != 1:
        return None
    sample = evenly(images)[..., 0].astype(np.float32) / 255
    edges = np.stack([edge_pixels(image) for image in sample])
    background = np.median(edges)
    if 0.1 < background < 0.9 or np.abs(edges - background).mean() > 0.02:
        return None
    light_ink = bool(background < 0.5)
    inks = [ink for ink in (sample if light_ink else 1 - sample) if (ink > VISIBLE).any()]
    if len(inks) < MIN_IMAGES:
        return None
    stroke = float(np.median([stroke_width(ink) for ink in inks]))
    placing = _measure_placing(inks)
    box, offsets = float(np.median(placing.sides)), placing.offsets
    uneven = np.std(placing.sides) > box / 8 or offsets.std(axis=0).max() > box / 20
    if uneven or stroke > MAX_STROKE * box:
        return None
    return InkStyle(light_ink, round(box), placing.by_mass, placing.mean_offset, stroke)


def style_of_pairs(style, pairs):
    """Return the style of images of two overlapping items each, given that of single ones.

    The strokes stay those of single items. The ink of a pair is as large, and placed, as that of
    most pairs. These vary, by the shifts of both items, so more counts as placed already.
    `pairs` are uint8 (N, H, W, 1), with the background of the single items.
    """
    sample = pairs[..., 0].astype(np.float32) / 255
    placing = _measure_placing(
        [ink for ink in (sample if style.light_ink else 1 - sample) if (ink > VISIBLE).any()]
    )
    box = round(float(np.median(placing.sides)))
    off_place = np.abs(placing.offsets - placing.mean_offset).max(axis=1)
    deviations = np.maximum(np.abs(placing.sides - box), off_place)
    return style._replace(
        box=box,
        by_mass=placing.by_mass,
        offset=placing.mean_offset,
        tolerance=max(style.tolerance, float(np.quantile(deviations, 0.99))),
    )


class _Placing(NamedTuple):
    """How large N images' ink is, and where it is."""

    sides: np.ndarray  # (N,), pixels of the longer side
    by_mass: bool  # whether its centre of mass varies less than that of its bounding box
    offsets: np.ndarray  # (N, 2), how far below and right of the image's middle that centre is

    @property
    def mean_offset(self):
        down, right = self.offsets.mean(axis=0)
        return float(down), float(right)


def _measure_placing(inks):
    """Return the _Placing of inks, each (H, W) floats from 0 to 1."""
    sides = np.array([_longer_side(ink) for ink in inks])
    of_boxes, of_masses = (
        np.array([_offset(ink, by_mass) for ink in inks]) for by_mass in (False, True)
    )
    by_mass = bool(of_masses.std(axis=0).max() <= of_boxes.std(axis=0).max())
    return _Placing(sides, by_mass, of_masses if by_mass else of_boxes)


def follows(image, style):
    """Return whether an image, uint8 (H, W, 1), already has ink placed in a style."""
    ink = image[..., 0].astype(np.float32) / 255
    if not style.light_ink:
        ink = 1 - ink
    if not (ink > VISIBLE).any():
        return False
    off_centre = np.abs(_offset(ink, style.by_mass) - style.offset).max()
    return bool(max(abs(_longer_side(ink) - style.box), off_centre) <= style.tolerance)


def stroke_width(ink):
    """Estimate the mean width of the strokes of ink (H, W) from 0 to 1, in pixels.

    It is twice their area over their outline's length.
    """
    mask = np.pad(ink > 0.4, 1)
    outline = sum(np.count_nonzero(np.diff(mask, axis=axis)) for axis in (0, 1))
    # An outline of random direction takes 4/π times its length in steps along the axes.
    return 2 * np.count_nonzero(mask) / max(outline * np.pi / 4, 1)


def _longer_side(ink):
    """Return the longer side of the bounding box of ink, in pixels."""
    return max(part.stop - part.start for part in _bounding_box(ink))


def _offset(ink, by_mass):
    """Return how far below and right of an image's middle its ink is centred, in pixels: (2,)."""
    middle = (np.array(ink.shape) - 1) / 2
    if by_mass:
        return np.array(ndimage.center_of_mass(ink)) - middle
    return np.array([(part.start + part.stop - 1) / 2 for part in _bounding_box(ink)]) - middle


def _bounding_box(ink):
    """Return the slices of the rows and columns that have ink."""
    visible = ink > VISIBLE
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


# --- Paper and ink --------------------------------------------------------------------------------


class Ink(NamedTuple):
    """Ink taken off its paper."""

    strokes: np.ndarray  # (h, w) floats from 0 to 1, in their bounding box; reduced if it is large
    size: tuple[int, int]  # height and width of the bounding box in the image, pixels
    light: bool  # whether the ink is lighter than the paper


def isolate(image):
    """Take ink off its paper: return the Ink of an image, uint8 (H, W, C), None if there is none.

    The paper may be uneven, coloured and noisy, and the ink of any colour, darker or lighter than
    it. Several strokes belong together; specks do not belong to them. The paper has to reach the
    edges of the image.
    """
    light = has_light_ink(image)
    dark_ink = 255 - image if light else image
    strokes, box, scale = _find_ink(dark_ink)
    if strokes is None:
        return None
    if scale < 1:  # look again, at the ink alone and in a higher resolution
        margin = MARGIN * max(strokes.shape)
        rows, columns = (
            slice(max(0, round((s.start - margin) / scale)), round((s.stop + margin) / scale))
            for s in box
        )
        closer, _, closer_scale = _find_ink(dark_ink[rows, columns])
        if closer is not None:
            strokes, scale = closer, closer_scale
    height, width = (round(side / scale) for side in strokes.shape)
    return Ink(strokes, (height, width), light)


def has_light_ink(image):
    """Return whether an image, uint8 (H, W, C), differs from its edges most by what is lighter."""
    small = [ndimage.gaussian_filter(c, 1) for c in _reduced_channels(image)]
    lighter = max(channel.max() - np.median(edge_pixels(channel)) for channel in small)
    darker = max(np.median(edge_pixels(channel)) - channel.min() for channel in small)
    return bool(lighter > darker)


def _scale_of(image):
    """Return the factor that makes an image no larger than the size at which ink is looked for."""
    return min(1, WORKING_SIZE / max(image.shape[:2]))


def _reduced_channels(image):
    """Return the channels of an image, uint8 (H, W, C), as floats from 0 to 1, reduced if large."""
    size = [max(1, round(side * _scale_of(image))) for side in image.shape[1::-1]]
    return [
        np.asarray(Image.fromarray(image[..., c]).resize(size, Image.Resampling.BOX), np.float32)
        / 255
        for c in range(image.shape[-1])
    ]


def _find_ink(image):
    """Find dark ink in an image (H, W, C), reduced if it is large.

    Returns:
        The ink in its bounding box, the box in the reduced image, and the scale of that image;
        None for the first two if there is no ink.
    """
    # Coloured ink may show in one channel only.
    contrast = np.max([_contrast(channel) for channel in _reduced_channels(image)], axis=0)
    ink = _keep_strokes(contrast)
    if ink is None:
        return None, None, _scale_of(image)
    box = _bounding_box(ink)
    return ink[box], box, _scale_of(image)


def _contrast(channel):
    """Return how much darker than the paper each pixel of a channel (H, W) is.

    The paper is what a grey-level closing, which removes dark strokes, leaves after smoothing.
    A closing also flattens the dark end of a slope, so a slope of the light is taken out first.
    """
    longest = max(channel.shape)
    step = max(1, round(longest / 100))  # paper is smooth, so few pixels show it
    small = ndimage.gaussian_filter(channel, 0.5 * step)[::step, ::step]
    window = 2 * round(WINDOW / 2 * max(small.shape)) + 1
    slope = _fitted_plane(ndimage.grey_closing(small, (window, window), mode="nearest"))
    paper = slope + ndimage.grey_closing(small - slope, (window, window), mode="nearest")
    paper = ndimage.gaussian_filter(paper, window / 6, mode="nearest")
    zoom = [n / m for n, m in zip(channel.shape, paper.shape, strict=True)]
    paper = ndimage.zoom(paper, zoom, order=1, mode="nearest", grid_mode=True)
    smooth = ndimage.gaussian_filter(channel, 0.7) if longest > 60 else channel
    return np.maximum(paper - smooth, 0)


def _fitted_plane(values):
    """Return the plane nearest to values (H, W) in the sense of least squares."""
    y, x = np.indices(values.shape).reshape(2, -1)
    terms = np.stack([np.ones_like(x), y, x], axis=1).astype(np.float64)
    weights, *_ = np.linalg.lstsq(terms, values.ravel().astype(np.float64), rcond=None)
    return (terms @ weights).reshape(values.shape).astype(values.dtype)


def _keep_strokes(contrast):
    """Keep strokes, and drop paper, shadows and specks, of a contrast (H, W) with the paper.

    Returns:
        (H, W) floats from 0 to 1, or None if there is no ink.
    """
    # Ink may cover more than half of an image, so noise is measured between neighbours.
    noise = 1.4826 * np.median(np.abs(contrast - ndimage.gaussian_filter(contrast, 2)))
    floor = max(np.quantile(contrast, 0.25) + 5 * noise, MIN_CONTRAST)
    candidates = contrast[contrast > floor]
    if not candidates.size:
        return None
    level = np.median(candidates[candidates >= otsu_threshold(candidates)])  # the ink's
    everywhere = np.ones((3, 3))
    parts, count = ndimage.label(contrast > max(floor, 0.35 * level), everywhere)
    numbers = np.arange(1, count + 1)
    mass = ndimage.sum_labels(np.minimum(contrast, level), parts, numbers)
    strongest = ndimage.maximum(contrast, parts, numbers)
    area = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    large = (mass >= SPECK * mass.max()) & (area >= MIN_AREA)
    kept = numbers[large & (strongest > 0.6 * level)]
    if not kept.size:
        return None
    around = ndimage.binary_dilation(np.isin(parts, kept), everywhere, iterations=2)
    ink = np.clip((contrast - floor / 2) / level, 0, 1) * around
    return ink if (ink > VISIBLE).any() else None


def otsu_threshold(values):
    """Return the threshold that splits values from 0 to 1 with the largest variance between groups.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    counts, edges = np.histogram(values, 256, (0, 1))
    below, above = np.cumsum(counts)[:-1], counts.sum() - np.cumsum(counts)[:-1]
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    split = (below > 0) & (above > 0)
    if not split.any():
        return float(values.min())
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = np.where(split, below * above * (means[0] - means[1]) ** 2, -1)
    return float(edges[1:-1][np.argmax(between)])


# --- Placing --------------------------------------------------------------------------------------


def place(ink, style, shape):
    """Place ink the way a data set does.

    Args:
        ink: (h, w) floats from 0 to 1, the strokes of `isolate`.
        style: InkStyle.
        shape: (H, W, 1) of the result, uint8.
    """
    ink = _thicken(ink, style, _scale_to_fit(ink, style, shape))
    scale = _scale_to_fit(ink, style, shape)
    size = [max(1, round(n * scale)) for n in ink.shape[::-1]]
    method = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC
    ink = np.clip(np.asarray(Image.fromarray(np.float32(ink)).resize(size, method)), 0, 1)
    ink = np.clip(ink / max(np.percentile(ink[ink > 0.1], 90), 0.3), 0, 1)  # as strong as a set's
    centre = (np.array(ink.shape) - 1) / 2
    if style.by_mass:
        centre = np.array(ndimage.center_of_mass(ink))
    canvas = np.zeros(shape[:2], np.float32)
    middle = (np.array(canvas.shape) - 1) / 2
    corner = np.rint(middle + style.offset - centre).astype(int)
    top, left = np.clip(corner, 0, np.subtract(canvas.shape, ink.shape))
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    if not style.light_ink:
        canvas = 1 - canvas
    return np.rint(255 * canvas).astype(np.uint8)[..., None]


def _scale_to_fit(ink, style, shape):
    """Return the factor that makes ink as large as a data set's, but no larger than the image."""
    return min(style.box / max(ink.shape), shape[0] / ink.shape[0], shape[1] / ink.shape[1])


def _thicken(ink, style, scale):
    """Widen the strokes of a thin pen, which would nearly vanish when they are scaled."""
    missing = 0.75 * style.stroke / scale - stroke_width(ink)  # pixels
    if missing <= 0:
        return ink
    radius = int(np.ceil(missing / 2))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = np.hypot(y, x) <= (missing + 1) / 2
    ink = ndimage.grey_dilation(np.pad(ink, 2 * radius + 1), footprint=disk)
    ink = ndimage.gaussian_filter(ink, 0.3 / scale)
    return ink[_bounding_box(ink)]
