"""How training images look: kept with the weights, so that predicting needs no data set."""

from typing import NamedTuple

import ops
import utils
from inputs import ink
from inputs.datasets import common_background

KEY = "appearance"  # in the metadata of weights; a run resumes whatever it says


class Appearance(NamedTuple):
    """What an image file is made to look like."""

    ink_style: ink.InkStyle | None  # None unless the images show ink on an even background
    background: str | None  # "light" or "dark" at the edges of nearly all images; None if neither
    # What was done to all images when they were loaded, if their colours do not say it.
    inverted: bool = False
    subtracted: tuple[int, ...] | None = None  # colour of a background
    white: int | None = None  # what stands for white in image files of more than 8 bits

    def to_metadata(self):
        """Return it as a dict that can be written as JSON."""
        style = self.ink_style._asdict() if self.ink_style else None
        return {
            "ink_style": style,
            "ground": self.background,
            "inverted": self.inverted,
            "subtracted": list(self.subtracted) if self.subtracted else None,
            "white": self.white,
        }


PLAIN = Appearance(None, None)  # files are fitted as a whole, and not inverted


def appearance_from(metadata):
    """Return the Appearance that was kept with weights; None in those of an earlier program."""
    if KEY not in metadata:
        return None
    kept = metadata[KEY]
    style, subtracted = kept["ink_style"], kept["subtracted"]
    if style is not None:
        style = ink.InkStyle(**style | {"offset": tuple(style["offset"])})
    return Appearance(
        style,
        kept["ground"],
        kept["inverted"],
        tuple(subtracted) if subtracted else None,
        kept["white"],
    )


def measure_appearance(data, inverted=False, subtracted=None, white=None):
    """Return the Appearance of training images (Examples), or of the pairs composed of them.

    For the other arguments see `Dataset`.
    """
    kept = {"subtracted": subtracted, "white": white}
    if data.images.shape[-1] != 1:
        return Appearance(None, None, inverted, **kept)
    style = ink.measure_style(data.images)
    if not data.overlap:
        return Appearance(style, common_background(data.images), **kept)
    pairs = compose_pairs(data)
    background = common_background(pairs)
    paper = "dark" if style and style.light_ink else "light"
    if style is None or background != paper:  # dark ink vanishes where pairs are added up
        return Appearance(None, background, **kept)
    return Appearance(ink.style_of_pairs(style, pairs), background, **kept)


def compose_pairs(data):
    """Return the first training images in pairs: uint8 (N, H', W', C)."""
    plan = data.evaluation_plan().take(slice(utils.SAMPLE))
    pairs, _ = ops.compose(data.images[plan.index], plan.shift, data.padding)
    return utils.to_uint8(pairs.numpy())


def background_of(image):
    """Return whether an image is "light" or "dark" at its edges."""
    return "light" if utils.is_dark_on_light(image) else "dark"
