import gzip
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageColor

import utils
from capsnet.errors import UserError
from figures import pages as figures

ROOT = Path(__file__).parent.parent
DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker")
CLOTHES += ("Bag", "Ankle boot")
LONG = [f"a class with a very long name, number {i}, and more of it" for i in range(10)]
INK, RED, GREY = (34, 34, 34), (192, 57, 43), (228, 230, 232)
LINE, SEAM, GAP = 28, 4, 60  # pixels: line of text, between images, between examples


class Page(NamedTuple):
    """What `figures._save_page` got, and the pixels that it returned."""

    title: str
    note: str
    contents: np.ndarray
    texts: list
    pixels: np.ndarray


@pytest.fixture
def pages(monkeypatch):
    """All pages drawn by a test."""
    drawn, save_page = [], figures._save_page

    def spy(path, title, note, contents, texts):
        drawn.append(
            Page(title, note, contents, texts, save_page(path, title, note, contents, texts))
        )
        return drawn[-1].pixels

    monkeypatch.setattr(figures, "_save_page", spy)
    return drawn


@pytest.fixture(scope="module")
def mnist():
    """The first 100 test images (100, 28, 28, 1) and their labels."""
    folder = ROOT / "data" / "mnist"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(images, np.uint8, 100 * 784, offset=16).reshape(100, 28, 28, 1)
    return images, np.frombuffer(labels, np.uint8, 100, offset=8).astype(int)


def noise(*shape, seed=0):
    """Different images of these numbers: (*shape, 28, 28, 1) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 28, 28, 1), np.uint8)


def read(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def has(picture, color):
    return bool((picture == color).all(-1).any())


def margins_are_white(picture):
    edges = picture[:20], picture[-20:], picture[:, :20], picture[:, -20:]
    return all((edge == 255).all() for edge in edges)


def places(picture, tile, scale=4):
    """Return (y, x) of each place of the picture that shows the tile (H, W, 1 or 3), enlarged."""
    tile = np.broadcast_to(tile, (*tile.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)
    height, width = tile.shape[:2]
    needle, found = tile[height // 2].tobytes(), []
    for y in range(picture.shape[0] - height + 1):
        row = picture[y + height // 2].tobytes()
        start = row.find(needle)
        while start >= 0:
            x = start // 3
            if start % 3 == 0 and np.array_equal(picture[y : y + height, x : x + width], tile):
                found.append((y, x))
            start = row.find(needle, start + 1)
    return found


def place(picture, tile, scale=4):
    """Return the only place that shows the tile."""
    (found,) = places(picture, tile, scale)
    return found


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


def origin(page):
    """Return (y, x) of the contents in the page, found by their last row: no text is over it."""
    needle = page.contents[-1].tobytes()
    for y in reversed(range(len(page.pixels))):
        start = page.pixels[y].tobytes().find(needle)
        if start >= 0 and start % 3 == 0:
            return y + 1 - len(page.contents), start // 3
    return None


# ---------------------------------------------------------------- grids of images


def test_the_grid_holds_every_pixel_in_its_place():
    for count, channels in ((1, 1), (5, 3), (9, 1)):
        images = np.random.default_rng(0).integers(0, 256, (count, 4, 6, channels), np.uint8)
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        grid = figures.image_grid(images)
        assert grid.dtype == np.uint8 and grid.shape == (rows * 5 - 1, columns * 7 - 1, channels)
        separators = np.ones(grid.shape[:2], bool)
        for i, image in enumerate(images):
            y, x = i // columns * 5, i % columns * 7
            np.testing.assert_array_equal(grid[y : y + 4, x : x + 6], image)
            separators[y : y + 4, x : x + 6] = False
        assert np.all(grid[separators] == 128)


@pytest.mark.filterwarnings("error")
def test_floats_are_clipped_and_rounded_to_bytes():
    image = np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, 100 / 255]).reshape(1, 1, 8, 1)
    expected = [0, 0, 128, 255, 255, 0, 255, 100]
    assert figures.image_grid(image).ravel().tolist() == expected
    assert figures.image_grid(image.astype(np.float32)).ravel().tolist() == expected


def test_a_saved_grid_is_the_grid_three_times_as_large(tmp_path, mnist):
    for images in (mnist[0][:10], noise(2).repeat(3, -1) // np.uint8([1, 2, 3])):
        returned = figures.save_grid(tmp_path / "a.png", images)
        picture, grid = read(tmp_path / "a.png"), figures.image_grid(images)
        np.testing.assert_array_equal(returned, picture)
        assert picture.shape == (3 * grid.shape[0], 3 * grid.shape[1], 3)
        for y, x in np.ndindex(3, 3):
            part = picture[y::3, x::3]
            np.testing.assert_array_equal(part, np.broadcast_to(grid, part.shape))


def test_overlaid_digits_are_the_sum_of_their_light_but_at_most_white():
    images = np.random.default_rng(0).random((3, 2, 5, 4, 1))
    overlay = figures.overlay_digits(images)
    assert overlay.shape == (3, 5, 4, 1)
    for n, y, x in np.ndindex(3, 5, 4):
        expected = min(1, images[n, 0, y, x, 0] + images[n, 1, y, x, 0])
        assert overlay[n, y, x, 0] == pytest.approx(expected)


# ---------------------------------------------------------------- evaluation


def test_each_example_of_reconstructions_is_a_triple_in_its_place_below_its_caption(pages, mnist):
    images, labels = mnist[0][:30], mnist[1][:30]
    predictions = labels.copy()
    predictions[4] = (labels[4] + 1) % 10
    with_label, without_label = noise(30, 1, seed=1), noise(30, 1, seed=2)
    arguments = images, with_label / 255, without_label / 255
    figures.save_reconstructions(None, *arguments, labels[:, None], predictions[:, None], DIGITS)
    (page,) = pages
    assert page.title == "Reconstructions"
    assert "with label: from the capsule of the true class" in page.note
    top, left = place(page.contents, images[0])
    width = 3 * 112 + 2 * SEAM
    for n in range(20):
        y, x = top + n // 4 * (112 + 2 * LINE), left + n % 4 * (width + GAP)
        triple = images[n], with_label[n, 0], without_label[n, 0]
        for column, tile in enumerate(triple):
            assert places(page.contents, tile) == [(y, x + column * (112 + SEAM))]
        caption = f"true {labels[n]}, predicted {predictions[n]}"
        assert lines_above(page, y, x, width, 1) == [(caption, RED if n == 4 else INK)]
        for column, head in enumerate(("input", "with label", "no label")):
            assert head in column_heads(page, x + column * (112 + SEAM) + 56)
    figures.save_reconstructions(
        None, *arguments, labels[:, None], labels[:, None], DIGITS, "Some images"
    )
    assert pages[-1].title == "Some images"
    for tile in (images[20], with_label[20, 0], without_label[20, 0]):
        assert places(page.contents, tile) == []


def test_red_is_in_the_picture_only_if_a_prediction_is_wrong(tmp_path, mnist):
    images, labels = mnist[0][:5], mnist[1][:5, None]
    wrong = labels.copy()
    wrong[4] = (wrong[4] + 1) % 10
    for predictions in (labels, wrong):
        arguments = images, images[:, None], images[:, None], labels, predictions, DIGITS
        returned = figures.save_reconstructions(tmp_path / "a.png", *arguments)
        picture = read(tmp_path / "a.png")
        np.testing.assert_array_equal(returned, picture)
        np.testing.assert_array_equal(figures.save_reconstructions(None, *arguments), picture)
        assert has(picture, RED) == (predictions is wrong)


def test_pairs_are_spelled_in_order_and_red_only_if_a_digit_is_wrong(pages):
    parts = np.zeros((1, 2, 28, 28, 1))
    parts[0, 0, :14], parts[0, 1, 7:21] = 0.7, 0.6
    bands = (7, 0.7), (7, 1), (7, 0.6), (7, 0)
    both = np.concatenate([np.full((rows, 28, 1), value) for rows, value in bands])
    tile = np.rint(both * 255).astype(np.uint8)
    right, wrong = ("true 2+7, predicted 2+7", INK), ("true 2+7, predicted 1+2", RED)
    for guess, caption in (([7, 2], right), ([2, 7], right), ([2, 1], wrong)):
        label, prediction = np.array([[7, 2]]), np.array([guess])
        figures.save_reconstructions(None, both[None], parts, parts, label, prediction, DIGITS)
        found = places(pages[-1].contents, tile)
        assert [x for _, x in found] == [0, 116, 232] and len({y for y, _ in found}) == 1
        assert lines_above(pages[-1], *found[0], 3 * 112 + 2 * SEAM, 1) == [caption]


def test_misclassified_images_carry_their_own_numbers_and_lengths(pages, mnist):
    images, labels = mnist[0][:70], mnist[1][:70]
    predictions = (labels + 1 + np.arange(70) % 9) % 10
    numbers = np.random.default_rng(0).permutation(10000)[:70]
    lengths = np.random.default_rng(1).random((70, 10))
    arguments = images, numbers, labels, predictions, lengths
    figures.save_misclassified(None, *arguments, CLOTHES)
    (page,) = pages
    assert page.title == "70 misclassified images, the first 64"
    assert "number in the test set, from 0" in page.note
    top, left = place(page.contents, images[0])
    for n in range(64):
        y, x = top + n // 8 * (112 + 4 * LINE), left + n % 8 * (112 + GAP)
        assert places(page.contents, images[n]) == [(y, x)]
        (number, grey), true, guess = lines_above(page, y, x, 112, 3)
        assert number == f"no. {numbers[n]}" and grey not in (INK, RED)
        true_length, guessed_length = lengths[n, labels[n]], lengths[n, predictions[n]]
        assert true == (f"{CLOTHES[labels[n]]}: {true_length:.2f}", INK)
        assert guess == (f"{CLOTHES[predictions[n]]}: {guessed_length:.2f}", RED)
    assert places(page.contents, images[64]) == []
    for count, title in ((64, "64 misclassified images"), (1, "1 misclassified image")):
        figures.save_misclassified(None, *(column[:count] for column in arguments), DIGITS)
        assert pages[-1].title == title and has(pages[-1].pixels, RED)


def test_no_misclassified_image_is_a_picture_too(tmp_path, pages):
    nothing = np.zeros((0, 28, 28, 1), np.uint8), [], [], [], np.zeros((0, 10))
    figures.save_misclassified(tmp_path / "a.png", *nothing, DIGITS)
    picture = read(tmp_path / "a.png")
    assert pages[0].title == "No image is misclassified" and margins_are_white(picture)
    assert has(picture, INK) and not has(picture, RED)


ORANGE, BLUE = np.array([255, 140, 0]), np.array([0, 115, 255])


def tinted(grey, color):
    """Return a grey image (H, W, 1) uint8 in a color."""
    return np.rint(grey.astype(float) * color / 255).astype(np.uint8)


def test_multi_shows_input_both_first_in_orange_and_second_in_blue(pages):
    inputs, parts = noise(23).repeat(3, -1), noise(23, 2, seed=1)
    labels = np.stack([np.arange(23) % 10, (np.arange(23) + 3) % 10], axis=1)
    predictions = labels[:, ::-1].copy()
    predictions[5] = labels[5, 0], (labels[5, 1] + 1) % 10
    figures.save_multi(None, "Pairs", inputs, parts / 255, labels, predictions, DIGITS)
    (page,) = pages
    assert page.title == "Pairs" and "(first orange, second blue)" in page.note
    top, left = place(page.contents, inputs[0])
    for n in range(20):
        block = 4 * 112 + 4 * SEAM + 2 * LINE + LINE - SEAM
        y, x = top + n // 10 * block, left + n % 10 * (112 + GAP)
        # The longest capsules are named in the order of the labels, and so are their images.
        second, first = parts[n]
        if n == 5:  # of this pair the first digit is right and already in its place
            first, second = parts[n]
        both = np.rint((first.astype(float) * ORANGE + second.astype(float) * BLUE) / 255)
        shown = inputs[n], both.astype(np.uint8), tinted(first, ORANGE), tinted(second, BLUE)
        for row, tile in enumerate(shown):
            assert places(page.contents, tile) == [(y + row * (112 + SEAM), x)]
            head = ("input", "both", "first", "second")[row]
            assert row_heads(page, y + row * (112 + SEAM) + 56) == [head]
        color = RED if n == 5 else INK
        captions = [
            (f"L:({labels[n, 0]}, {labels[n, 1]})", color),
            (f"R:({labels[n, 0]}, {labels[n, 1] if n != 5 else predictions[5, 1]})", color),
        ]
        assert lines_above(page, y, x, 112, 2) == captions
    assert places(page.contents, inputs[20]) == []


def test_multi_knows_pairs_in_any_order_and_colors_of_images(pages):
    inputs, parts = np.zeros((2, 28, 28, 1)), np.zeros((2, 2, 28, 28, 3), np.uint8)
    parts[:, 0, ..., 0], parts[:, 1, ..., 1:] = 153, (75, 78)  # both 51 as means of the channels
    for guess, color in (([3, 1], INK), ([1, 3], INK), ([3, 3], RED)):
        label, prediction = np.array([[8, 2], [1, 3]]), np.array([[2, 8], guess])
        figures.save_multi(None, "Pairs", inputs, parts, label, prediction, DIGITS)
        colors = {text.text: ImageColor.getrgb(text.color) for text in pages[-1].texts}
        assert colors["L:(8, 2)"] == colors["R:(8, 2)"] == INK
        named = {(3, 1): "R:(1, 3)", (1, 3): "R:(1, 3)", (3, 3): "R:(3, 3)"}[tuple(guess)]
        assert colors["L:(1, 3)"] == colors[named] == color
        assert has(pages[-1].pixels, RED) == (color == RED)
    for channels in ((51, 51, 51), (51, 28, 0), (0, 23, 51)):
        tile = np.broadcast_to(np.uint8(channels), (28, 28, 3))
        assert len(places(pages[-1].contents, tile)) == 2
    figures.save_multi(None, "Pairs", inputs[:1], parts[:1], label[:1], prediction[:1], CLOTHES)
    lines = [text.text for text in pages[-1].texts if text.anchor == "mm"]
    assert lines == ["L:(Bag,", "Pullover)", "R:(Bag,", "Pullover)"]


def lightness(color):
    """Return the relative luminance of an sRGB color, from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_the_colors_of_a_pair_are_told_apart_without_red_and_green_and_sum_to_white():
    first, second = map(np.array, figures.PAIR_COLORS)
    assert (first + second == 255).all()
    # Who confuses red and green still sees blue, and how light a color is.
    assert abs(int(first[2]) - int(second[2])) > 200
    light, dark = lightness(first) + 0.05, lightness(second) + 0.05
    assert light / dark > 1.5


def test_predictions_are_triples_below_their_captions(pages):
    images, reconstructions = noise(42), noise(42, seed=1)
    originals = [np.full((9 + n, 50, 1), n, np.uint8) for n in range(42)]
    captions = [[f"{n}.png", f"{n % 10}: 0.9"] for n in range(42)]
    # The command collects lists.
    figures.save_predictions(
        None, originals, list(images), list(reconstructions[:, None] / 255), captions
    )
    (page,) = pages
    assert page.title == "Predictions for 42 images, the first 40"
    assert page.note.startswith("the file, the image as the network gets it, and its recon")
    top, left = place(page.contents, images[0])
    left -= 112 + SEAM  # of the file, before it
    width = 3 * 112 + 2 * SEAM
    for n in range(40):
        y, x = top + n // 4 * (112 + 3 * LINE), left + n % 4 * (width + GAP)
        assert page.contents[y + 56, x + 56].tolist() == [n, n, n]
        assert places(page.contents, images[n]) == [(y, x + 112 + SEAM)]
        assert places(page.contents, reconstructions[n]) == [(y, x + 2 * (112 + SEAM))]
        assert lines_above(page, y, x, width, 2) == [(line, INK) for line in captions[n]]
    assert places(page.contents, images[40]) == []
    for count, title in ((40, "Predictions for 40 images"), (1, "Predictions for 1 image")):
        parts = originals[:count], images[:count], reconstructions[:count, None], captions[:count]
        figures.save_predictions(None, *parts)
        assert pages[-1].title == title


def test_predictions_of_pairs_have_both_reconstructions(pages):
    images, reconstructions = noise(5), noise(5, 2, seed=1)
    captions = [["a.png", "0: 0.9"]] * 5
    figures.save_predictions(None, images, images, list(reconstructions), captions)
    (page,) = pages
    assert page.note.endswith("its reconstructions from the 2 longest capsules")
    width = 4 * 112 + 3 * SEAM
    for n in range(5):
        y, x = 2 * LINE + n // 3 * (112 + 3 * LINE), n % 3 * (width + GAP)
        for place in (0, 1):
            left = x + (2 + place) * (112 + SEAM)
            assert places(page.contents, reconstructions[n, place]) == [(y, left)]


@pytest.mark.parametrize("side", [28, 36])  # 36 is enlarged by 3
def test_a_file_of_any_size_keeps_its_proportions_in_a_tile_as_large_as_the_others(pages, side):
    tile = 112 // side * side
    sizes = {(400, 100): (1, 0.25), (100, 400): (0.25, 1), (7, 7): (1, 1), (3, 6): (0.5, 1)}
    for (height, width), (rows, columns) in sizes.items():
        original = np.full((height, width, 3), (200, 30, 60), np.uint8)
        image = np.zeros((1, side, side, 1), np.uint8)
        figures.save_predictions(None, [original], image, image[:, None], [["a"]])
        contents = pages[-1].contents
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


def test_a_small_file_is_enlarged_in_squares_and_keeps_its_colours(pages):
    original = np.random.default_rng(2).integers(0, 256, (28, 28, 3), np.uint8)
    figures.save_predictions(None, [original], noise(1), noise(1, 1), [["a"]])
    shown = pages[-1].contents[LINE:, :112]
    for y, x in np.ndindex(28, 28):
        square = shown[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert (square[1:3, 1:3] == original[y, x]).all()  # all but the edge of the tile
        if 0 < y < 27 and 0 < x < 27:
            assert (square == original[y, x]).all()


# ---------------------------------------------------------------- confusion matrix


def test_a_confusion_matrix_agrees_with_counting_one_by_one():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 7, (2, 500)).astype(np.int32)
    expected = np.zeros((7, 7), np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    matrix = figures.confusion_matrix(labels, predictions, 7)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, expected)
    assert figures.confusion_matrix([], [], 3).shape == (3, 3)


def test_each_count_is_in_its_cell_true_classes_down_and_predicted_ones_across(pages):
    matrix = np.diag(np.arange(900, 1000, 10)) + np.triu(np.arange(100).reshape(10, 10) % 7, 1)
    matrix[8, 3], matrix[4, 2] = 40, 25
    for names in (DIGITS, CLOTHES):
        figures.save_confusion_matrix(None, matrix, names)
        page = pages[-1]
        wrong, total = matrix.sum() - np.trace(matrix), matrix.sum()
        assert page.title == f"{total:,} images, {wrong} wrong: error {100 * wrong / total:.2f}%"
        assert page.note == "the redder a cell, the more errors"
        height, width = ((size + 1) // 10 for size in page.contents.shape[:2])
        for i, j in np.ndindex(10, 10):
            y, x = i * height, j * width
            (text,) = [
                text
                for text in page.texts
                if x < text.x < x + width and y < text.y < y + height and text.x > 0 < text.y
            ]
            assert text.text == str(matrix[i, j])
            assert (text.x, text.y) == (x + width / 2, y + height / 2)
            share = math.sqrt(matrix[i, j] / 40)
            expected = GREY if i == j else [255 - share * (255 - part) for part in RED]
            cell = page.contents[y : y + height - 1, x : x + width - 1]
            assert np.abs(cell - np.array(expected)).max() <= 0.5
            color = ImageColor.getrgb(text.color)
            if matrix[i, j] == 0:
                assert color not in (INK, (255, 255, 255))
            else:
                on_dark = i != j and matrix[i, j] >= 25
                assert color == ((255, 255, 255) if on_dark else INK)
            assert text.font.getname()[1] == ("Bold" if i == j else "Book")
        for k, name in enumerate(names):
            assert column_heads(page, (k + 0.5) * width)[:1] == [name]
            assert row_heads(page, (k + 0.5) * height) == [name]
        (predicted,) = [text for text in page.texts if text.text == "predicted class"]
        (true,) = [text for text in page.texts if text.text == "true class"]
        assert predicted.y < -LINE and abs(predicted.x - page.contents.shape[1] / 2) < 1
        assert true.x < 0 and true.anchor == "rm"


def test_only_errors_are_red_and_a_few_of_them_are_pale():
    right = np.diag(np.arange(900, 1000, 10))
    few, many = right.copy(), right.copy()
    few[2, 7], many[2, 7] = 9, 10
    for matrix in (right, few, many):
        picture = figures.save_confusion_matrix(None, matrix, DIGITS)
        assert has(picture, RED) == (matrix is many)
        assert has(picture, GREY) and margins_are_white(picture)
    empty = figures.save_confusion_matrix(None, np.zeros((3, 3), int), "abc")
    assert margins_are_white(empty)


def test_a_matrix_of_many_classes_is_a_map_of_colors_of_bounded_size(pages):
    for n in (41, 100, 1000):
        matrix = 50 * np.eye(n, dtype=int)
        matrix[3, 30] = 16
        matrix[40, 2] = 4
        picture = figures.save_confusion_matrix(None, matrix, [str(i) for i in range(n)])
        assert max(picture.shape) < 3000
        page, side = pages[-1], len(pages[-1].contents) // n
        assert side >= 2 and [text.text for text in page.texts] == ["predicted class", "true class"]
        cells = page.contents[side // 2 :: side, side // 2 :: side].astype(int)
        assert cells.shape == (n, n, 3)
        assert tuple(cells[3, 30]) == RED and tuple(cells[30, 3]) == (255, 255, 255)
        assert np.abs(cells[40, 2] - (255 + np.array(RED)) / 2).max() <= 0.5
        assert (cells[np.diag_indices(n)] == GREY).all()
        np.testing.assert_array_equal(cells.repeat(side, 0).repeat(side, 1), page.contents)
    figures.save_confusion_matrix(None, np.eye(40, dtype=int), [str(i) for i in range(40)])
    assert len(pages[-1].texts) == 40 * 40 + 2 * 40 + 2


# ---------------------------------------------------------------- tweaked capsules


def test_tweak_pages_have_a_row_for_each_digit_or_dimension_and_a_column_for_each_step(pages):
    images, deltas = noise(3, 5), np.linspace(-0.25, 0.25, 5)
    figures.save_tweak(None, images / 255, deltas, 7, ("Ankle boot", "Bag", "Coat"))
    figures.save_tweak_overview(None, images / 255, deltas, "4")
    tweak, overview = pages
    assert tweak.title == "Dimension 7 of the longest capsule of each image, changed"
    assert overview.title == "Each dimension of the capsule of class 4, changed"
    row_names = ("Ankle boot", "Bag", "Coat"), ("dim 0", "dim 1", "dim 2")
    steps = "−0.25", "−0.12", "0", "+0.12", "+0.25"
    for page, names in zip(pages, row_names, strict=True):
        assert "the number above each column is added" in page.note
        for row, column in np.ndindex(3, 5):
            y, x = row * (112 + SEAM), column * (112 + SEAM)
            assert places(page.contents, images[row, column]) == [(y, x)]
            assert column_heads(page, x + 56) == [steps[column]]
            assert row_heads(page, y + 56) == [names[row]]


def test_tiles_are_enlarged_to_about_112_pixels_whatever_their_size_and_channels(pages):
    for size, scale in ((28, 4), (32, 3), (36, 3), (48, 2), (200, 1)):
        images = np.random.default_rng(0).integers(0, 256, (1, 2, size, size, 3), np.uint8)
        figures.save_tweak_overview(None, images, (0, 1), "x")
        assert place(pages[-1].contents, images[0, 0], scale) == (0, 0)
        assert place(pages[-1].contents, images[0, 1], scale) == (0, size * scale + SEAM)
    for shape in (28, 14), (14, 28):  # the longer side decides
        images = np.random.default_rng(0).integers(0, 256, (1, 1, *shape, 3), np.uint8)
        figures.save_tweak_overview(None, images, (0,), "x")
        assert place(pages[-1].contents, images[0, 0], 4) == (0, 0)


def test_a_sweep_moves_every_dimension_of_every_digit_to_and_fro(tmp_path, pages):
    dims, digits, steps = 3, 2, 4
    # Black and white images keep their pixels in 64 colors.
    images = np.random.default_rng(0).integers(0, 2, (dims, digits, steps, 28, 28, 1))
    deltas = -0.25, -0.1, 0, 0.25
    for names in (("3", "Bag"), ("3", "Ankle boot"), ("Coat", "Sandal"), LONG[:2]):
        pages.clear()
        figures.save_sweep(tmp_path / "a.gif", images.astype(np.float32), deltas, names)
        changes = [page.title.split("changed by ")[1] for page in pages]
        assert changes == ["−0.25", "−0.10", "0", "+0.25"]
        for page in pages:
            assert [column_heads(page, k * 116 + 56) for k in range(dims)] == [["0"], ["1"], ["2"]]
            for row, name in enumerate(names):
                (head,) = row_heads(page, row * 116 + 56)
                assert head == name or (head[-1] == "…" and name.startswith(head[:-1]))
        with Image.open(tmp_path / "a.gif") as picture:
            assert picture.format == "GIF" and picture.info["loop"] == 0
            assert picture.n_frames == 6  # 0 1 2 3 2 1
            frames = []
            for number in range(6):
                picture.seek(number)
                assert picture.info["duration"] == 120
                frames.append(np.asarray(picture.convert("RGB")))
        tiles = (images * 255).astype(np.uint8)
        frames = [np.where(frame > 127, 255, 0).astype(np.uint8) for frame in frames]
        top, left = place(frames[0], tiles[0, 0, 0], 2)
        for frame, step in zip(frames, (0, 1, 2, 3, 2, 1), strict=True):
            for dim, digit in np.ndindex(dims, digits):
                expected = (top + digit * 58, left + dim * 58)
                assert places(frame, tiles[dim, digit, step], 2) == [expected]


def test_a_named_sweep_has_the_original_and_each_column_below_its_caption(tmp_path, pages):
    originals = np.random.default_rng(1).integers(0, 2, (2, 28, 28, 1), np.uint8) * 255
    images = np.random.default_rng(0).integers(0, 2, (2, 3, 4, 28, 28, 1))
    captions = [[(f"{digit}{column}", "dim") for column in range(4)] for digit in "ab"]
    deltas = -0.25, -0.1, 0, 0.25
    figures.save_named_sweep(tmp_path / "a.gif", originals, images / 1.0, deltas, captions)
    changes = [page.title.split("changed by ")[1] for page in pages]
    assert changes == ["−0.25", "−0.10", "0", "+0.25"]
    tiles = (images * 255).astype(np.uint8)
    for step, page in enumerate(pages):
        for digit, row in enumerate(captions):
            y = 2 * LINE + digit * (112 + 3 * LINE)
            for column, (name, dim) in enumerate(row):
                tile = originals[digit] if column == 0 else tiles[digit, column - 1, step]
                x = column * (112 + 24)
                assert places(page.contents, tile) == [(y, x)]
                assert lines_above(page, y, x, 112, 2) == [(name, INK), (dim, INK)]
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 6 and picture.info["loop"] == 0  # 0 1 2 3 2 1
        assert picture.size == pages[0].pixels.shape[1::-1]


def test_an_overview_of_chosen_dimensions_has_their_names(pages):
    for names in (None, ["slant (dim 3)", "width (dim 5)"]):
        figures.save_tweak_overview(None, noise(2, 3), (-0.1, 0, 0.1), "7", names)
        heads = [row_heads(pages[-1], row * 116 + 56) for row in range(2)]
        assert heads == [[name] for name in names or ["dim 0", "dim 1"]]
    assert [page.title.split(" of ")[0] for page in pages] == [
        "Each dimension",
        "Chosen dimensions",
    ]


def test_a_sweep_keeps_shades_of_grey(tmp_path):
    shades = np.linspace(0.02, 0.98, 12).reshape(3, 4, 1)
    images = np.broadcast_to(shades[..., None, None, None], (3, 4, 1, 28, 28, 1))
    figures.save_sweep(tmp_path / "a.gif", images, [0], "abcd")
    with Image.open(tmp_path / "a.gif") as picture:
        values, counts = np.unique(np.asarray(picture.convert("L")), return_counts=True)
    tiles = np.sort(values[counts >= 56 * 56 - 20])[:12]  # the white page is last
    assert np.abs(tiles - 255 * shades.ravel()).max() <= 4


# ---------------------------------------------------------------- all pages


def draw_all(path, names):
    """Draw one page of each kind; `names` of 10 classes."""
    images, labels = noise(10), np.arange(10)
    pairs, several = np.stack([labels, (labels + 1) % 10], axis=1), noise(10, 2)
    lengths, deltas = np.full((10, 10), 0.5), np.linspace(-0.25, 0.25, 11)
    matrix = np.full((10, 10), 12345)
    captions = [[name, "0: 0.98"] for name in names]
    figures.save_reconstructions(path, images, several, several, pairs, pairs[::-1], names)
    yield
    figures.save_misclassified(path, images, labels, labels, pairs[:, 1], lengths, names)
    yield
    figures.save_multi(path, "Pairs", images, several, pairs, pairs, names)
    yield
    figures.save_predictions(path, images, images, several, captions)
    yield
    figures.save_confusion_matrix(path, matrix, names)
    yield
    figures.save_tweak(path, noise(10, 11), deltas, 3, names)
    yield
    figures.save_tweak_overview(path, noise(3, 11), deltas, names[0])
    yield


@pytest.mark.parametrize("names", [DIGITS, CLOTHES, LONG], ids=["short", "medium", "long"])
def test_texts_do_not_overlap_each_other_or_images_and_none_is_cut_off(names, pages, tmp_path):
    for _ in draw_all(tmp_path / "a.png", names):
        page = pages[-1]
        np.testing.assert_array_equal(read(tmp_path / "a.png"), page.pixels)
        assert margins_are_white(page.pixels)
        boxes = []
        for text in page.texts:
            left, top, right, bottom = text.font.getbbox(text.text, anchor=text.anchor)
            boxes.append((text.x + left, text.y + top, text.x + right, text.y + bottom))
            assert text.font.size >= 5 * 200 / 72
        for (a, b), (c, d) in itertools.combinations([(box[:2], box[2:]) for box in boxes], 2):
            apart = b[0] < c[0] or d[0] < a[0] or b[1] < c[1] or d[1] < a[1]
            assert apart, "two texts overlap"
        if "redder" in page.note:
            continue  # counts are over the cells
        for left, top, right, bottom in boxes:
            rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
            columns = slice(max(0, math.floor(left)), max(0, math.ceil(right)))
            assert (page.contents[rows, columns] == 255).all(), "a text is over an image"


def test_long_names_are_cut_with_an_ellipsis_and_short_ones_stay_whole(pages):
    for names in (CLOTHES, LONG):
        for _ in draw_all(None, names):
            # In the titles, captions and heads: cut ones end with an ellipsis.
            texts = [text.text for text in pages[-1].texts]
            if names is CLOTHES and pages[-1].title != "Reconstructions":  # of pairs: too long
                assert not any("…" in text for text in texts)
            for text in texts:
                assert "…" not in text[:-1]
    assert any(text.text.endswith("…") for page in pages for text in page.texts)


def test_every_text_is_drawn_in_its_color_in_its_place(pages):
    for _ in draw_all(None, DIGITS):
        page = pages[-1]
        y, x = origin(page)
        height, width = page.contents.shape[:2]
        expected = np.full_like(page.pixels, 255)
        expected[y : y + height, x : x + width] = page.contents
        same = (page.pixels == expected).all(-1)
        first_line = y + round(min(text.y for text in page.texts)) - LINE // 2
        texts = [(text.x, text.y, text) for text in page.texts]
        for text_x, text_y, text in texts:
            left, top, right, bottom = text.font.getbbox(text.text, anchor=text.anchor)
            rows = slice(round(y + text_y + top) - 2, round(y + text_y + bottom) + 2)
            columns = slice(round(x + text_x + left) - 2, round(x + text_x + right) + 2)
            ink = page.pixels[rows, columns].astype(int) - ImageColor.getrgb(text.color)
            assert np.abs(ink).sum(-1).min() < 60
            same[rows, columns] = True
        for title_line in (same[36 : 36 + LINE], same[36 + LINE : 36 + 2 * LINE]):
            assert not title_line.all()
        same[36:first_line] = True
        assert same.all()  # nothing else is in the page


def test_pictures_have_200_dots_an_inch(tmp_path):
    figures.save_tweak_overview(tmp_path / "a.png", noise(1, 2), (0, 1), "x")
    figures.save_figure(tmp_path / "b.png", figures.new_figure(1)[0])
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    path, images = tmp_path / "file" / "a.png", noise(1, 1, 1)
    for save in (
        lambda: figures.save_grid(path, images[0, 0]),
        lambda: figures.save_tweak(path, images[0], [0], 1, "x"),
        lambda: figures.save_sweep(path.with_suffix(".gif"), images, [0], "x"),
        lambda: figures.save_figure(path, figures.new_figure(1)[0]),
    ):
        with pytest.raises(UserError, match=r"cannot write .*file"):
            save()


def test_no_picture_needs_a_display_or_pyplot(tmp_path):
    code = (
        "import sys, numpy\nfrom figures import pages as figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figures.save_tweak_overview(sys.argv[1], numpy.zeros((2, 2, 8, 8, 3)), (0, 1), 'x')\n"
        "curve = numpy.arange(1, 9), numpy.full(8, 0.5)\n"
        "curves = {'train': {'loss/total': curve, 'accuracy': curve}}\n"
        "figures.save_learning_curves(sys.argv[2], curves, 4, 'x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    files = tmp_path / "a.png", tmp_path / "b.png"
    command = [sys.executable, "-c", code, *map(str, files)]
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    subprocess.run(command, cwd=ROOT, env=environment | {"MPLBACKEND": "tkagg"}, check=True)
    assert margins_are_white(read(files[0])) and read(files[1]).shape == (560, 1400, 3)


# ---------------------------------------------------------------- curves


@pytest.fixture
def drawn(monkeypatch):
    """All Matplotlib figures saved by a test."""
    found, save_figure = [], figures.save_figure

    def spy(path, figure):
        found.append(figure)
        return save_figure(path, figure)

    monkeypatch.setattr(figures, "save_figure", spy)
    return found


def test_learning_curves_hold_loss_and_error_of_training_and_validation(tmp_path, drawn):
    steps = np.arange(1, 1001)
    loss, accuracy = 0.5 * np.exp(-steps / 300), 1 - 0.4 * np.exp(-steps / 300)
    train = {"loss/total": (steps, loss), "accuracy": (steps, accuracy)}
    every = slice(99, None, 100)
    validation = {
        "loss/total": (steps[every], 2 * loss[every]),
        "accuracy": (steps[every], accuracy[every] / 2),
    }
    curves = {"train": train, "validation": validation}
    returned = figures.save_learning_curves(tmp_path / "a.png", curves, 100, "kmnist")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), returned)
    assert returned.shape == (560, 1400, 3)
    left, right = drawn[0].axes
    assert [panel.get_title("left") for panel in (left, right)] == [
        "Total loss on kmnist",
        "Error on kmnist, % of images",
    ]
    shown = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in (left,)]
    assert shown == [["training images", "held-out images"]]
    for panel, training, validating in (
        (left, loss, 2 * loss[every]),
        (right, 100 * (1 - accuracy), 100 * (1 - accuracy[every] / 2)),
    ):
        assert panel.get_yscale() == "log" and panel.get_xlabel() == "epoch"
        first, second = panel.lines
        assert (first.get_label(), first.get_color()) == ("training images", figures.LINE_COLORS[0])
        assert (second.get_label(), second.get_color()) == (
            "held-out images",
            figures.LINE_COLORS[1],
        )
        # 1000 points become the means of 100 times 10.
        np.testing.assert_allclose(first.get_xdata(), np.arange(5.5, 1000, 10) / 100)
        means = [sum(training[n : n + 10]) / 10 for n in range(0, 1000, 10)]
        np.testing.assert_allclose(first.get_ydata(), means)
        assert first.get_marker() in (None, "None")
        np.testing.assert_allclose(second.get_xdata(), np.arange(1, 11))
        np.testing.assert_allclose(second.get_ydata(), validating)
        assert second.get_marker() == "o"


def test_learning_curves_may_lack_validation_and_have_a_single_point():
    blue, red = (np.array(ImageColor.getrgb(color)) for color in figures.LINE_COLORS)
    train, validation = (
        {tag: (np.array([100]), np.array([value])) for tag in ("loss/total", "accuracy")}
        for value in (0.5, 0.4)
    )
    for curves in ({"train": train}, {"train": train, "validation": validation}):
        picture = figures.save_learning_curves(None, curves, 100, "x")
        for half in (picture[:, :700], picture[:, 700:]):
            near = [(np.abs(half.astype(int) - color).sum(-1) < 40).any() for color in (blue, red)]
            assert near == [True, "validation" in curves]


def test_steps_without_any_error_leave_a_gap_in_the_curve(drawn):
    accuracy = np.where(np.arange(240) // 3 % 2, 1.0, 0.8)  # in parts of three steps
    steps = np.arange(1, 241)
    curves = {"train": {"loss/total": (steps, np.ones(240)), "accuracy": (steps, accuracy)}}
    figures.save_learning_curves(None, curves, 60, "x")
    (line,) = drawn[0].axes[1].lines
    np.testing.assert_allclose(line.get_xdata(), np.arange(2, 241, 3) / 60)
    np.testing.assert_allclose(line.get_ydata(), [20, np.nan] * 40)
    np.testing.assert_array_equal(accuracy[:6], [0.8, 0.8, 0.8, 1, 1, 1])  # not changed


def test_a_histogram_of_lengths_counts_present_and_absent_capsules(tmp_path, drawn):
    stream = np.random.default_rng(0)
    present, absent = stream.beta(9, 1, 400), stream.beta(1, 9, 3600)
    returned = figures.save_length_histogram(tmp_path / "a.png", present, absent)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), returned)
    (panel,) = drawn[0].axes
    assert panel.get_yscale() == "log" and panel.get_xlabel() == "length"
    texts = [text.get_text() for text in panel.get_legend().get_texts()]
    assert texts == [
        *("class absent: 3,600 capsules", "class present: 400 capsules"),
        "margins of the loss",
    ]
    assert [line.get_xdata()[0] for line in panel.lines] == [0.1, 0.9]
    for patch, values in zip(panel.patches, (absent, present), strict=True):
        steps = patch.get_xy()
        for low in range(0, 100, 2):
            count = sum(low / 100 <= value < low / 100 + 0.02 for value in values)
            heights = steps[np.isclose(steps[:, 0], low / 100), 1]
            assert count == 0 or np.isclose(heights, count).any(), low


def test_bars_have_their_names_values_and_units_and_the_last_is_the_tools_own(drawn):
    panels = [("Step", ["a", "b", "here"], [1200, 50.5, 7], "ms"), ("Other", ["c"], [3], "s")]
    figures.save_bars(None, panels)
    for panel, (title, names, values, unit) in zip(drawn[0].axes, panels, strict=True):
        assert (panel.get_title("left"), panel.get_xlabel()) == (title, unit)
        assert [label.get_text() for label in panel.get_yticklabels()] == names
        assert [bar.get_width() for bar in panel.patches] == values
        assert [text.get_text() for text in panel.texts] == [f"{value:,g}" for value in values]
        bottom, top = panel.get_ylim()
        assert bottom > top  # the first bar is the upper one
        *_, last = panel.patches
        assert tuple(round(255 * c) for c in last.get_facecolor()[:3]) == ImageColor.getrgb(
            figures.LINE_COLORS[0]
        )


def test_figures_of_the_experiments_have_panels_of_a_common_style(tmp_path):
    figure, panels = figures.new_figure(3, width=9, sharey=True)
    assert len(panels) == 3 and tuple(figure.get_size_inches()) == (9, 2.8)
    panels[0].set_ylim(0, 7)
    assert panels[2].get_ylim() == (0, 7)
    figures.label_panel(panels[0], "Title", "unit")
    figures.label_panel(panels[1], "Another title")
    assert [panel.get_title("left") for panel in panels] == ["Title", "Another title", ""]
    assert [panel.get_xlabel() for panel in panels] == ["unit", "", ""]
    assert not panels[0].spines["top"].get_visible() and panels[2].spines["top"].get_visible()
    pixels = figures.save_figure(tmp_path / "a.png", figure)
    assert pixels.shape == (560, 1800, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels)


def test_a_class_whose_name_the_font_lacks_is_drawn_by_its_number():
    """A character that a font lacks is drawn as the box that U+FFFE, which is none, gets."""
    names = ("cat", "猫", "Ünï-çødé жук", "a\N{SLOTH}b", "ω≤½")
    assert figures.drawable_names(names) == ("cat", "#1", "Ünï-çødé жук", "#3", "ω≤½")
    font = figures._font(7, True)
    box = bytes(font.getmask("\ufffe"))
    for name, shown in zip(names, figures.drawable_names(names), strict=True):
        assert any(bytes(font.getmask(c)) == box for c in name) == (name != shown)


def test_a_page_is_as_large_as_the_texts_around_its_pixels_need():
    lines = {"g": (20, 300), "M": (-150, 10), "W": (400, 10)}  # below, left, right of the pixels
    texts = [figures._fit(x, y, text, color="#ff0000") for text, (x, y) in lines.items()]
    page = figures._save_page(None, "t", "n", np.zeros((50, 60, 3), np.uint8), texts)
    red = (page[..., 0] > 200) & (page[..., 1] < 100)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert figures._MARGIN <= page.shape[0] - rows[-1] - 1 <= figures._MARGIN + figures._LINE
    for free in columns[0], page.shape[1] - columns[-1] - 1:
        assert figures._MARGIN - 2 <= free <= figures._MARGIN + 8


@pytest.mark.parametrize("name, shown", [("a$b$_{", "a$b$_{"), ("猫", "the data set")])
def test_learning_curves_are_drawn_whatever_the_name_of_the_data_set(
    monkeypatch, recwarn, name, shown
):
    titles = []
    save = figures.save_figure
    monkeypatch.setattr(
        figures,
        "save_figure",
        lambda path, figure: (
            titles.extend(panel.get_title("left") for panel in figure.axes) or save(path, figure)
        ),
    )
    curves = {"train": {"loss/total": ([1, 2], [0.5, 0.4]), "accuracy": ([1, 2], [0.1, 0.2])}}
    figures.save_learning_curves(None, curves, 2, name)
    assert titles == [f"Total loss on {shown}", f"Error on {shown}, % of images"]
    assert not recwarn.list


def test_a_caption_with_the_bytes_of_an_odd_file_name_is_drawn():
    tile = np.zeros((1, 1, 1, 28, 28, 1), np.uint8)
    for name in (os.fsdecode(b"\xff\xfe.png"), "a\nb"):
        shown = figures._save_examples(None, "a", "b", tile, [[(name, "#222222")]], 1)
        escaped = utils.printable(name)
        expected = figures._save_examples(None, "a", "b", tile, [[(escaped, "#222222")]], 1)
        np.testing.assert_array_equal(shown, expected)


def test_of_other_channels_than_colours_the_first_or_the_first_three_are_shown(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 5), np.uint8)
    for channels, shown in (1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2]):
        pixels = figures.save_grid(tmp_path / "a.png", images[..., :channels])
        np.testing.assert_array_equal(pixels[1 : 6 * 3 : 3, 1 : 4 * 3 : 3], images[0][..., shown])
