import math

import numpy as np
import pytest

from figures import grids


def test_the_grid_holds_every_pixel_in_its_place_three_times_as_large():
    for count, channels in ((1, 1), (5, 3), (9, 1)):
        images = np.random.default_rng(0).integers(0, 256, (count, 4, 6, channels), np.uint8)
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        expected = np.full((rows * 5 - 1, columns * 7 - 1, 3), 128)
        for i, image in enumerate(images):
            y, x = i // columns * 5, i % columns * 7
            expected[y : y + 4, x : x + 6] = image
        picture = grids.draw_grid(images)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, np.kron(expected, np.ones((3, 3, 1))))


@pytest.mark.filterwarnings("error")
def test_floats_are_clipped_and_rounded_to_bytes():
    image = np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, 100 / 255]).reshape(1, 1, 8, 1)
    for floats in (image, image.astype(np.float32)):
        shown = grids.draw_grid(floats)[0, ::3, 0]
        assert shown.tolist() == [0, 0, 128, 255, 255, 0, 255, 100]


def test_of_other_channels_than_colors_the_first_or_the_first_three_are_shown():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 5), np.uint8)
    for channels, shown in (1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2]):
        pixels = grids.draw_grid(images[..., :channels])
        np.testing.assert_array_equal(pixels[1 : 6 * 3 : 3, 1 : 4 * 3 : 3], images[0][..., shown])


def test_overlaid_digits_are_the_sum_of_their_light_but_at_most_white():
    images = np.random.default_rng(0).random((3, 2, 5, 4, 1))
    overlay = grids.overlay_digits(images)
    assert overlay.shape == (3, 5, 4, 1)
    for n, y, x in np.ndindex(3, 5, 4):
        expected = min(1, images[n, 0, y, x, 0] + images[n, 1, y, x, 0])
        assert overlay[n, y, x, 0] == pytest.approx(expected)


def test_tiles_are_enlarged_to_about_112_pixels_by_their_longer_side():
    for size, scale in ((28, 4), (32, 3), (36, 3), (48, 2), (200, 1)):
        for shape in (size, size), (size, size // 2), (size // 2, size):
            tiles = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
            expected = np.kron(tiles, np.ones((scale, scale, 1)))
            np.testing.assert_array_equal(grids.enlarge(tiles), expected)
