import math

import numpy as np
from drawing import (
    CLOTHES,
    DIGITS,
    GREY,
    INK,
    LINE,
    RED,
    column_heads,
    has,
    margins_are_white,
    page_of,
    row_heads,
)
from PIL import ImageColor

from figures.confusion import confusion_matrix, draw_confusion_matrix

WHITE = (255, 255, 255)


def test_a_confusion_matrix_agrees_with_counting_one_by_one():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 7, (2, 500)).astype(np.int32)
    expected = np.zeros((7, 7), np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    matrix = confusion_matrix(labels, predictions, 7)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, expected)
    assert confusion_matrix([], [], 3).shape == (3, 3)


def test_each_count_is_in_its_cell_true_classes_down_and_predicted_ones_across():
    matrix = np.diag(np.arange(900, 1000, 10)) + np.triu(np.arange(100).reshape(10, 10) % 7, 1)
    matrix[8, 3], matrix[4, 2] = 40, 25
    wrong, total = matrix.sum() - np.trace(matrix), matrix.sum()
    for names in (DIGITS, CLOTHES):
        page = page_of(draw_confusion_matrix, matrix, names)
        assert page.title == f"{total:,} images, {wrong} wrong: error {100 * wrong / total:.2f}%"
        assert page.note == "the redder a cell, the more errors"
        height, width = ((size + 1) // 10 for size in page.contents.shape[:2])
        texts = {(text.x, text.y): text for text in page.texts}
        for i, j in np.ndindex(10, 10):
            text = texts[(j + 0.5) * width, (i + 0.5) * height]
            assert text.text == str(matrix[i, j])
            share = math.sqrt(matrix[i, j] / 40)
            expected = GREY if i == j else [255 - share * (255 - part) for part in RED]
            y, x = i * height, j * width
            cell = page.contents[y : y + height - 1, x : x + width - 1]
            assert np.abs(cell - np.array(expected)).max() <= 0.5
            color = ImageColor.getrgb(text.color)
            if matrix[i, j] == 0:
                assert color not in (INK, WHITE)
            else:
                assert color == (WHITE if i != j and matrix[i, j] >= 25 else INK)
            assert text.font.getname()[1] == ("Bold" if i == j else "Book")
        for k, name in enumerate(names):
            assert column_heads(page, (k + 0.5) * width)[:1] == [name]
            assert row_heads(page, (k + 0.5) * height) == [name]
        assert len(texts) == 100 + 2 * 10 + 2
        (predicted,) = [text for text in page.texts if text.text == "predicted class"]
        (true,) = [text for text in page.texts if text.text == "true class"]
        assert predicted.y < -LINE and abs(predicted.x - page.contents.shape[1] / 2) < 1
        assert true.x < 0 and true.anchor == "rm"


def test_only_errors_are_red_and_a_few_of_them_are_pale():
    right = np.diag(np.arange(900, 1000, 10))
    few, many = right.copy(), right.copy()
    few[2, 7], many[2, 7] = 9, 10
    for matrix in (right, few, many):
        picture = draw_confusion_matrix(matrix, DIGITS)
        assert has(picture, RED) == (matrix is many)
        assert has(picture, GREY) and margins_are_white(picture)
    assert margins_are_white(draw_confusion_matrix(np.zeros((3, 3), int), "abc"))


def test_a_matrix_of_many_classes_is_a_map_of_colors_of_bounded_size():
    for n in (41, 1000):
        matrix = 50 * np.eye(n, dtype=int)
        matrix[3, 30], matrix[40, 2] = 16, 4
        page = page_of(draw_confusion_matrix, matrix, [str(i) for i in range(n)])
        assert max(page.pixels.shape) < 3000
        assert [text.text for text in page.texts] == ["predicted class", "true class"]
        side = len(page.contents) // n
        assert side >= 2
        expected = np.full((n, n, 3), 255, np.uint8)
        expected[np.diag_indices(n)] = GREY
        expected[3, 30], expected[40, 2] = RED, np.rint((255 + np.array(RED)) / 2)
        assert np.array_equal(page.contents, expected.repeat(side, 0).repeat(side, 1))
    page = page_of(draw_confusion_matrix, np.eye(40, dtype=int), [str(i) for i in range(40)])
    assert len(page.texts) == 40 * 40 + 2 * 40 + 2
