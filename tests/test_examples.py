import gzip
from pathlib import Path

import numpy as np
import pytest
from drawing import (
    CLOTHES,
    DIGITS,
    GAP,
    GREY,
    INK,
    LINE,
    RED,
    SEAM,
    column_heads,
    has,
    lines_above,
    margins_are_white,
    noise,
    page_of,
    reconstructed,
    row_heads,
    white_with,
)
from PIL import ImageColor

from figures import examples

ROOT = Path(__file__).parent.parent
SIDE = 112 + SEAM
TRIPLE = 3 * 112 + 2 * SEAM  # width


@pytest.fixture(scope="module")
def mnist():
    """The first 100 test images (100, 28, 28, 1) and their labels."""
    folder = ROOT / "data" / "mnist"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(images, np.uint8, 100 * 784, offset=16).reshape(100, 28, 28, 1)
    return images, np.frombuffer(labels, np.uint8, 100, offset=8).astype(int)


def test_each_example_of_reconstructions_is_a_triple_in_its_place_below_its_caption(mnist):
    images, labels = mnist[0][:30], mnist[1][:30]
    predictions = labels.copy()
    predictions[4] = (labels[4] + 1) % 10
    decoded = noise(30, 1, seed=1), noise(30, 1, seed=2)
    shown, labels = (images, *(part / 255 for part in decoded)), labels[:, None]
    outputs = reconstructed(*shown, predictions[:, None])
    page = page_of(examples.draw_reconstructions, outputs, labels, DIGITS)
    assert page.title == "Reconstructions"
    assert "with label: from the capsule of the true class" in page.note
    tiles = {}
    for n in range(20):
        y, x = LINE + n // 4 * (112 + 2 * LINE), n % 4 * (TRIPLE + GAP)
        for column, tile in enumerate((images[n], decoded[0][n, 0], decoded[1][n, 0])):
            tiles[y, x + column * SIDE] = tile
        caption = f"true {labels[n, 0]}, predicted {predictions[n]}"
        assert lines_above(page, y, x, TRIPLE, 1) == [(caption, RED if n == 4 else INK)]
        for column, head in enumerate(("input", "with label", "no label")):
            assert head in column_heads(page, x + column * SIDE + 56)
    np.testing.assert_array_equal(page.contents, white_with(tiles))
    assert has(page.pixels, RED)
    outputs = reconstructed(*shown, labels)
    page = page_of(examples.draw_reconstructions, outputs, labels, DIGITS, "Some images")
    assert page.title == "Some images" and not has(page.pixels, RED)


def test_pairs_are_spelled_in_order_and_red_only_if_a_digit_is_wrong():
    parts = np.zeros((1, 2, 28, 28, 1))
    parts[0, 0, :14], parts[0, 1, 7:21] = 0.7, 0.6
    bands = (7, 0.7), (7, 1), (7, 0.6), (7, 0)
    both = np.concatenate([np.full((rows, 28, 1), value) for rows, value in bands])
    tile = np.rint(both * 255).astype(np.uint8)
    expected = white_with({(LINE, column * SIDE): tile for column in range(3)})
    right, wrong = ("true 2+7, predicted 2+7", INK), ("true 2+7, predicted 1+2", RED)
    for guess, caption in (([7, 2], right), ([2, 7], right), ([2, 1], wrong)):
        outputs = reconstructed(both[None], parts, parts, np.array([guess]))
        page = page_of(examples.draw_reconstructions, outputs, np.array([[7, 2]]), DIGITS)
        np.testing.assert_array_equal(page.contents, expected)
        assert lines_above(page, LINE, 0, TRIPLE, 1) == [caption]


def test_misclassified_images_carry_their_own_numbers_and_lengths(mnist):
    images, labels = mnist[0][:70], mnist[1][:70]
    predictions = (labels + 1 + np.arange(70) % 9) % 10
    numbers = np.random.default_rng(0).permutation(10000)[:70]
    lengths = np.random.default_rng(1).random((70, 10))
    arguments = images, numbers, labels, predictions, lengths
    page = page_of(examples.draw_misclassified, *arguments, CLOTHES)
    assert page.title == "70 misclassified images, the first 64"
    assert "number in the test set, from 0" in page.note
    tiles = {}
    for n in range(64):
        y, x = 3 * LINE + n // 8 * (112 + 4 * LINE), n % 8 * (112 + GAP)
        tiles[y, x] = images[n]
        (number, grey), true, guess = lines_above(page, y, x, 112, 3)
        assert number == f"no. {numbers[n]}" and grey not in (INK, RED)
        true_length, guessed_length = lengths[n, labels[n]], lengths[n, predictions[n]]
        assert true == (f"{CLOTHES[labels[n]]}: {true_length:.2f}", INK)
        assert guess == (f"{CLOTHES[predictions[n]]}: {guessed_length:.2f}", RED)
    np.testing.assert_array_equal(page.contents, white_with(tiles))
    for count, title in ((64, "64 misclassified images"), (1, "1 misclassified image")):
        some = (column[:count] for column in arguments)
        assert page_of(examples.draw_misclassified, *some, DIGITS).title == title


def test_no_misclassified_image_is_a_picture_too():
    nothing = np.zeros((0, 28, 28, 1), np.uint8), [], [], [], np.zeros((0, 10))
    page = page_of(examples.draw_misclassified, *nothing, DIGITS)
    assert page.title == "No image is misclassified" and margins_are_white(page.pixels)
    assert has(page.pixels, INK) and not has(page.pixels, RED)


ORANGE, BLUE = np.array([255, 140, 0]), np.array([0, 115, 255])


def tinted(grey, color):
    """Return a grey image (H, W, 1) uint8 in a color."""
    return np.rint(grey.astype(float) * color / 255).astype(np.uint8)


def test_multi_shows_input_both_first_in_orange_and_second_in_blue():
    inputs, parts = noise(23).repeat(3, -1), noise(23, 2, seed=1)
    labels = np.stack([np.arange(23) % 10, (np.arange(23) + 3) % 10], axis=1)
    predictions = labels[:, ::-1].copy()
    predictions[5] = labels[5, 0], (labels[5, 1] + 1) % 10
    page = page_of(examples.draw_multi, "Pairs", inputs, parts / 255, labels, predictions, DIGITS)
    assert page.title == "Pairs" and "(first orange, second blue)" in page.note
    tiles = {}
    for n in range(20):
        y, x = 2 * LINE + n // 10 * (4 * SIDE - SEAM + 3 * LINE), n % 10 * (112 + GAP)
        # The longest capsules are named in the order of the labels, and so are their images.
        second, first = parts[n]
        if n == 5:  # of this pair the first digit is right and already in its place
            first, second = parts[n]
        both = np.rint((first.astype(float) * ORANGE + second.astype(float) * BLUE) / 255)
        shown = inputs[n], both.astype(np.uint8), tinted(first, ORANGE), tinted(second, BLUE)
        for row, tile in enumerate(shown):
            tiles[y + row * SIDE, x] = tile
            head = ("input", "both", "first", "second")[row]
            assert row_heads(page, y + row * SIDE + 56) == [head]
        color = RED if n == 5 else INK
        captions = [
            (f"L:({labels[n, 0]}, {labels[n, 1]})", color),
            (f"R:({labels[n, 0]}, {labels[n, 1] if n != 5 else predictions[5, 1]})", color),
        ]
        assert lines_above(page, y, x, 112, 2) == captions
    np.testing.assert_array_equal(page.contents, white_with(tiles))


def test_multi_knows_pairs_in_any_order_and_colors_of_images():
    inputs, parts = np.zeros((2, 28, 28, 1)), np.zeros((2, 2, 28, 28, 3), np.uint8)
    parts[:, 0, ..., 0], parts[:, 1, ..., 1:] = 153, (75, 78)  # both 51 as means of the channels
    label = np.array([[8, 2], [1, 3]])
    shown = (0, 0, 0), (51, 51, 51), (51, 28, 0), (0, 23, 51)
    expected = white_with(
        {
            (2 * LINE + row * SIDE, x): np.broadcast_to(np.uint8(color), (28, 28, 3))
            for x in (0, 112 + GAP)
            for row, color in enumerate(shown)
        }
    )
    for guess, named, color in (
        ([3, 1], "R:(1, 3)", INK),
        ([1, 3], "R:(1, 3)", INK),
        ([3, 3], "R:(3, 3)", RED),
    ):
        prediction = np.array([[2, 8], guess])
        page = page_of(examples.draw_multi, "Pairs", inputs, parts, label, prediction, DIGITS)
        np.testing.assert_array_equal(page.contents, expected)
        colors = {text.text: ImageColor.getrgb(text.color) for text in page.texts}
        assert colors["L:(8, 2)"] == colors["R:(8, 2)"] == INK
        assert colors["L:(1, 3)"] == colors[named] == color
    first = (part[:1] for part in (inputs, parts, label, prediction))
    page = page_of(examples.draw_multi, "Pairs", *first, CLOTHES)
    lines = [text.text for text in page.texts if text.anchor == "mm"]
    assert lines == ["L:(Bag,", "Pullover)", "R:(Bag,", "Pullover)"]


def lightness(color):
    """Return the relative luminance of an sRGB color, from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_the_colors_of_a_pair_are_told_apart_without_red_and_green_and_sum_to_white():
    first, second = map(np.array, examples.PAIR_COLORS)
    assert (first + second == 255).all()
    # Who confuses red and green still sees blue, and how light a color is.
    assert abs(int(first[2]) - int(second[2])) > 200
    light, dark = lightness(first) + 0.05, lightness(second) + 0.05
    assert light / dark > 1.5


def test_predictions_are_triples_below_their_captions():
    images, reconstructions = noise(42), noise(42, seed=1)
    originals = [np.full((9 + n, 9 + n, 1), n, np.uint8) for n in range(42)]
    captions = [[f"{n}.png", f"{n % 10}: 0.9"] for n in range(42)]
    # The command collects lists.
    arguments = originals, list(images), list(reconstructions[:, None] / 255), captions
    page = page_of(examples.draw_predictions, *arguments)
    assert page.title == "Predictions for 42 images, the first 40"
    assert page.note.startswith("the file, the image as the network gets it, and its recon")
    tiles = {}
    for n in range(40):
        y, x = 2 * LINE + n // 4 * (112 + 3 * LINE), n % 4 * (TRIPLE + GAP)
        tiles[y, x] = np.full((112, 112, 3), GREY, np.uint8)
        tiles[y, x][1:-1, 1:-1] = n
        tiles[y, x + SIDE], tiles[y, x + 2 * SIDE] = images[n], reconstructions[n]
        assert lines_above(page, y, x, TRIPLE, 2) == [(line, INK) for line in captions[n]]
    np.testing.assert_array_equal(page.contents, white_with(tiles))
    for count, title in ((40, "Predictions for 40 images"), (1, "Predictions for 1 image")):
        some = (part[:count] for part in arguments)
        assert page_of(examples.draw_predictions, *some).title == title


def test_predictions_of_a_network_without_capsules_have_no_reconstruction():
    images, originals = noise(2), [np.full((9, 9, 1), 7, np.uint8)] * 2
    none = list(np.zeros((2, 0, *images.shape[1:])))
    captions = [["a.png"], ["b.png"]]
    page = page_of(examples.draw_predictions, originals, list(images), none, captions)
    assert page.note == "the file, the image as the network gets it"
    assert page.contents.shape[1] == 2 * (2 * SIDE - SEAM) + GAP


def test_predictions_of_pairs_have_both_reconstructions():
    images, reconstructions = noise(5), noise(5, 2, seed=1)
    captions = [["a.png", "0: 0.9"]] * 5
    page = page_of(examples.draw_predictions, images, images, list(reconstructions), captions)
    assert page.note.endswith("its reconstructions from the 2 longest capsules")
    for n in range(5):
        y, x = 2 * LINE + n // 3 * (112 + 3 * LINE), n % 3 * (4 * SIDE - SEAM + GAP)
        for place in (0, 1):
            left = x + (2 + place) * SIDE
            shown = page.contents[y : y + 112, left : left + 112]
            expected = white_with({(0, 0): reconstructions[n, place]})
            np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("side", [28, 36])  # 36 is enlarged by 3
def test_a_file_of_any_size_keeps_its_proportions_in_a_tile_as_large_as_the_others(side):
    tile = 112 // side * side
    sizes = {(400, 100): (1, 0.25), (100, 400): (0.25, 1), (7, 7): (1, 1), (3, 6): (0.5, 1)}
    for (height, width), (rows, columns) in sizes.items():
        original = np.full((height, width, 3), (200, 30, 60), np.uint8)
        image = np.zeros((1, side, side, 1), np.uint8)
        arguments = [original], image, image[:, None], [["a"]]
        contents = page_of(examples.draw_predictions, *arguments).contents
        assert contents.shape == (LINE + tile, 3 * tile + 2 * SEAM, 3)
        shown = contents[LINE:, :tile]
        red = (shown == (200, 30, 60)).all(-1)
        # Its edge of a pixel is grey.
        expected = [min(round(tile * share), tile - 2) for share in (rows, columns)]
        assert abs(red.any(axis=1).sum() - expected[0]) <= 1
        assert abs(red.any(axis=0).sum() - expected[1]) <= 1
        y, x = (np.flatnonzero(red.any(axis=axis)).mean() for axis in (1, 0))
        assert abs(y - (tile - 1) / 2) <= 0.5 and abs(x - (tile - 1) / 2) <= 0.5
        assert (shown[~red] == GREY).all()


def test_a_small_file_is_enlarged_in_squares_and_keeps_its_colors():
    original = np.random.default_rng(2).integers(0, 256, (28, 28, 3), np.uint8)
    arguments = [original], noise(1), noise(1, 1), [["a"]]
    shown = page_of(examples.draw_predictions, *arguments).contents[LINE:, :112]
    for y, x in np.ndindex(28, 28):
        square = shown[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert (square[1:3, 1:3] == original[y, x]).all()  # all but the edge of the tile
        if 0 < y < 27 and 0 < x < 27:
            assert (square == original[y, x]).all()
