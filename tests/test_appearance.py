import json

import numpy as np
import pytest
from story import compose_slowly

from inputs import ink
from inputs.appearance import (
    KEY,
    PLAIN,
    Appearance,
    appearance_from,
    background_of,
    compose_pairs,
    measure_appearance,
)
from inputs.pipeline import Examples

pytest_plugins = ["story_fixtures"]


def test_the_background_of_an_image_is_that_of_its_edges():
    image = np.zeros((5, 5, 1), np.uint8)
    image[2, 2] = 255
    assert [background_of(image), background_of(255 - image)] == ["dark", "light"]


@pytest.fixture
def digits(few):
    return Examples(few.x_train, few.y_train)


@pytest.fixture
def pairs(digits):
    return digits._replace(padding=4, max_shift=4, overlap=True)


def test_the_appearance_of_digits_is_their_style_and_their_background(digits):
    expected = ink.measure_style(digits.images)
    assert expected is not None
    assert measure_appearance(digits) == Appearance(expected, "dark")
    inverted = digits._replace(images=255 - digits.images)
    style, background = measure_appearance(inverted)[:2]
    assert not style.light_ink and background == "light"


def test_images_in_colour_are_taken_as_they_are(digits):
    colours = digits._replace(images=digits.images.repeat(3, -1))
    assert measure_appearance(colours) == PLAIN == Appearance(None, None)
    changed = measure_appearance(colours, inverted=True, subtracted=(1, 2, 3))
    assert changed == Appearance(None, None, True, (1, 2, 3))


def test_the_pairs_that_are_measured_are_those_of_an_evaluation(pairs):
    composed = compose_pairs(pairs)
    expected = compose_slowly(pairs.images, pairs.evaluation_plan(), 4)
    assert composed.shape == (400, 36, 36, 1) and composed.dtype == np.uint8
    assert np.abs(composed - 255 * expected).max() <= 0.51


def test_the_ink_of_pairs_is_as_large_and_placed_as_in_most_pairs(pairs, digits):
    single, (style, background) = (
        ink.measure_style(digits.images),
        measure_appearance(pairs)[:2],
    )
    assert background == "dark" and style.light_ink and style.stroke == single.stroke
    sides, middles = [], []
    for image in compose_pairs(pairs)[..., 0]:
        rows, columns = (np.flatnonzero((image > 51).any(axis=axis)) for axis in (1, 0))
        sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        middles.append([(rows[0] + rows[-1]) / 2 - 17.5, (columns[0] + columns[-1]) / 2 - 17.5])
    assert single.box == 20 < style.box == round(np.median(sides)) < 28
    if not style.by_mass:
        np.testing.assert_allclose(style.offset, np.mean(middles, axis=0), atol=0.05)
    assert np.abs(style.offset).max() < 1 and 1 < style.tolerance < 8


def test_nearly_all_pairs_of_the_training_are_left_as_they_are(pairs):
    style = measure_appearance(pairs).ink_style
    composed = compose_pairs(pairs)
    assert np.mean([ink.follows(image, style) for image in composed]) > 0.95
    small = np.zeros((36, 36, 1), np.uint8)
    small[2:7, 2:5] = 255
    assert not ink.follows(small, style)


def test_pairs_of_dark_ink_have_no_style_as_they_are_added_up(pairs):
    inverted = pairs._replace(images=255 - pairs.images)
    assert measure_appearance(inverted).ink_style is None


def test_an_appearance_is_the_same_after_it_was_kept_as_json(digits, pairs):
    for data in (digits, pairs, digits._replace(images=digits.images.repeat(3, -1))):
        appearance = measure_appearance(data, inverted=True, subtracted=(40,), white=4095)
        assert appearance.white == 4095
        kept = json.loads(json.dumps({KEY: appearance.to_metadata()}))
        assert appearance_from(kept) == appearance
    assert appearance_from({"shape": {}, "training": {}}) is None
