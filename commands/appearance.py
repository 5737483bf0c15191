"""How training images look: kept with the weights, so that predicting needs no data set."""

from typing import NamedTuple

import ink
import ops
import utils
from datasets import common_ground

KEY = "appearance"  # in the metadata of weights; a run resumes whatever it says
SAMPLE = 1000  # images, or pairs, that are looked at


class Appearance(NamedTuple):
    """What an image file is made to look like."""

    ink_style: ink.InkStyle | None  # None if the images are no ink on an even ground
    ground: str | None  # "light" or "dark" at the edges of nearly all images; None if neither

    def to_metadata(self):
        """Return it as a dict that can be written as JSON."""
        style = self.ink_style._asdict() if self.ink_style else None
        return {"ink_style": style, "ground": self.ground}


PLAIN = Appearance(None, None)  # files are fitted as a whole, and not inverted


def appearance_from(metadata):
    """Return the Appearance that was kept with weights; None in those of an earlier program."""
    if KEY not in metadata:
        return None
    style, ground = metadata[KEY]["ink_style"], metadata[KEY]["ground"]
    if style is not None:
        style = ink.InkStyle(**style | {"offset": tuple(style["offset"])})
    return Appearance(style, ground)


def measure_appearance(data):
    """Return the Appearance of training images, or of the pairs composed of them.

    Args:
        data: Data.
    """
    if data.images.shape[-1] != 1:
        return PLAIN
    style = ink.measure_style(data.images)
    if not data.overlap:
        return Appearance(style, common_ground(data.images))
    pairs = compose_pairs(data)
    ground = common_ground(pairs)
    paper = "dark" if style and style.light_ink else "light"
    if style is None or ground != paper:  # dark ink vanishes where pairs are added up
        return Appearance(None, ground)
    return Appearance(ink.style_of_pairs(style, pairs), ground)


def compose_pairs(data):
    """Return the first training images in pairs: uint8 (N, H', W', C)."""
    plan = data.evaluation_plan().take(slice(SAMPLE))
    pairs, _ = ops.compose(data.images[plan.index], plan.shift, data.padding)
    return utils.to_uint8(pairs.numpy())


def ground_of(image):
    """Tell whether an image is "light" or "dark" at its edges."""
    return "light" if utils.is_dark_on_light(image) else "dark"
