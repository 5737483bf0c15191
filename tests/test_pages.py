import itertools
import math
import os

import numpy as np
import pytest
from drawing import CLOTHES, DIGITS, LINE, margins_are_white, noise, origin, pages_of, reconstructed
from PIL import ImageColor

import utils
from figures import confusion, examples, pages, tweaks

LONG = [f"a class with a very long name, number {i}, and more of it" for i in range(10)]


def draw_all(names):
    """Draw a page of each kind; `names` of 10 classes."""
    images, labels, pairs_of_images = noise(10), np.arange(10), noise(10, 2)
    pairs = np.stack([labels, (labels + 1) % 10], axis=1)
    lengths, deltas = np.full((10, 10), 0.5), np.linspace(-0.25, 0.25, 11)
    decoded = images, pairs_of_images
    outputs = reconstructed(*decoded, pairs_of_images, pairs[::-1])
    examples.draw_reconstructions(outputs, pairs, names)
    examples.draw_misclassified(images, labels, labels, pairs[:, 1], lengths, names)
    examples.draw_multi("Pairs", *decoded, pairs, pairs, names)
    examples.draw_predictions(images, *decoded, [[name, "0: 0.98"] for name in names])
    confusion.draw_confusion_matrix(np.full((10, 10), 12345), names)
    tweaks.draw_tweak(noise(10, 11), deltas, 3, names)
    tweaks.draw_tweak_overview(noise(3, 11), deltas, names[0])


@pytest.fixture(scope="module")
def drawn():
    """A page of each kind for names of each length."""
    kinds = {"short": DIGITS, "medium": CLOTHES, "long": LONG}
    return {kind: pages_of(draw_all, names) for kind, names in kinds.items()}


@pytest.mark.parametrize("kind", ["short", "medium", "long"])
def test_texts_do_not_overlap_each_other_or_images_and_none_is_cut_off(drawn, kind):
    for page in drawn[kind]:
        assert margins_are_white(page.pixels)
        boxes = []
        for text in page.texts:
            left, top, right, bottom = text.font.getbbox(text.text, anchor=text.anchor)
            boxes.append((text.x + left, text.y + top, text.x + right, text.y + bottom))
            assert text.font.size >= 5 * 200 / 72
        for a, b in itertools.combinations(boxes, 2):
            apart = a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
            assert apart, "two texts overlap"
        if "redder" in page.note:
            continue  # counts are over the cells
        for left, top, right, bottom in boxes:
            rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
            columns = slice(max(0, math.floor(left)), max(0, math.ceil(right)))
            assert (page.contents[rows, columns] == 255).all(), "a text is over an image"


def test_long_names_are_cut_with_an_ellipsis_and_short_ones_stay_whole(drawn):
    for page in drawn["medium"]:
        if page.title != "Reconstructions":  # of pairs: too long
            assert not any("…" in text.text for text in page.texts)
    for page in drawn["medium"] + drawn["long"]:
        assert not any("…" in text.text[:-1] for text in page.texts)
    assert any(text.text.endswith("…") for page in drawn["long"] for text in page.texts)


def test_every_text_is_drawn_in_its_color_in_its_place(drawn):
    for page in drawn["short"]:
        y, x = origin(page)
        height, width = page.contents.shape[:2]
        expected = np.full_like(page.pixels, 255)
        expected[y : y + height, x : x + width] = page.contents
        same = (page.pixels == expected).all(-1)
        for text in page.texts:
            left, top, right, bottom = text.font.getbbox(text.text, anchor=text.anchor)
            rows = slice(round(y + text.y + top) - 2, round(y + text.y + bottom) + 2)
            columns = slice(round(x + text.x + left) - 2, round(x + text.x + right) + 2)
            ink = page.pixels[rows, columns].astype(int) - ImageColor.getrgb(text.color)
            assert np.abs(ink).sum(-1).min() < 60
            same[rows, columns] = True
        for title_line in (same[36 : 36 + LINE], same[36 + LINE : 36 + 2 * LINE]):
            assert not title_line.all()
        same[36 : y + round(min(text.y for text in page.texts)) - LINE // 2] = True
        assert same.all()  # nothing else is in the page


def test_a_page_is_as_large_as_the_texts_around_its_pixels_need():
    lines = {"g": (20, 300), "M": (-150, 10), "W": (400, 10)}  # below, left, right of the pixels
    texts = [pages.fit_text(x, y, text, color="#ff0000") for text, (x, y) in lines.items()]
    page = pages.draw_page("t", "n", np.zeros((50, 60, 3), np.uint8), texts)
    red = (page[..., 0] > 200) & (page[..., 1] < 100)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert 36 <= page.shape[0] - rows[-1] - 1 <= 36 + LINE
    for free in columns[0], page.shape[1] - columns[-1] - 1:
        assert 34 <= free <= 44


def test_a_class_whose_name_the_font_lacks_is_drawn_by_its_number():
    """A character that a font lacks is drawn as the box that U+FFFE, which is none, gets."""
    names = ("cat", "猫", "Ünï-çødé жук", "a\N{SLOTH}b", "ω≤½")
    assert pages.drawable_names(names) == ("cat", "#1", "Ünï-çødé жук", "#3", "ω≤½")
    font = pages.load_font(7, True)
    box = bytes(font.getmask("\ufffe"))
    for name, shown in zip(names, pages.drawable_names(names), strict=True):
        assert any(bytes(font.getmask(c)) == box for c in name) == (name != shown)


def test_a_caption_with_the_bytes_of_an_odd_file_name_is_drawn():
    for name in (os.fsdecode(b"\xff\xfe.png"), "a\nb"):
        text = pages.fit_text(0, 0, name)
        assert text.text == utils.printable(name) != name
        assert (pages.draw_page("a", "b", np.zeros((9, 9, 3), np.uint8), [text]) < 255).any()
