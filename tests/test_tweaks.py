import numpy as np
from drawing import SEAM, column_heads, noise, origin, page_of, pages_of, row_heads, white_with

from figures import tweaks


def test_tweak_pages_have_a_row_for_each_digit_or_dimension_and_a_column_for_each_step():
    images, deltas = noise(3, 5), np.linspace(-0.25, 0.25, 5)
    classes, chosen = ("Ankle boot", "Bag", "Coat"), ["slant (dim 3)", "width (dim 5)", "dim 7"]
    overview, of_class = tweaks.draw_tweak_overview, "of the capsule of class 4, changed"
    tweaked = images / 255, deltas
    pages = {
        "Dimension 7 of the longest capsule of each image, changed": (
            page_of(tweaks.draw_tweak, *tweaked, 7, classes),
            classes,
        ),
        f"Each dimension {of_class}": (
            page_of(overview, *tweaked, "4"),
            ("dim 0", "dim 1", "dim 2"),
        ),
        f"Chosen dimensions {of_class}": (page_of(overview, *tweaked, "4", chosen), chosen),
    }
    side = 112 + SEAM
    expected = white_with(
        {(row * side, column * side): images[row, column] for row, column in np.ndindex(3, 5)}
    )
    for title, (page, names) in pages.items():
        assert page.title == title and "the number above each column is added" in page.note
        np.testing.assert_array_equal(page.contents, expected)
        for column, step in enumerate(("−0.25", "−0.12", "0", "+0.12", "+0.25")):
            assert column_heads(page, column * side + 56) == [step]
        assert [row_heads(page, row * side + 56) for row in range(3)] == [[name] for name in names]


def test_a_sweep_has_a_page_for_each_step_with_every_dimension_of_every_digit():
    images, deltas = noise(3, 2, 4), (-0.25, -0.1, 0, 0.25)  # dimensions, digits, steps
    # Names of different widths move the images to other places of the page.
    for names in (("3", "Bag"), ("3", "Ankle boot"), ("Coat", "Sandal"), ("a very " * 9, "b")):
        pages = pages_of(tweaks.draw_sweep, images, deltas, names)
        halves = tweaks.draw_sweep(images, deltas, names)
        changes = [page.title.split("changed by ")[1] for page in pages]
        assert changes == ["−0.25", "−0.10", "0", "+0.25"]
        for step, (page, half) in enumerate(zip(pages, halves, strict=True)):
            places = {(k * 116, d * 116): images[d, k, step] for d, k in np.ndindex(3, 2)}
            np.testing.assert_array_equal(page.contents, white_with(places))
            assert [column_heads(page, d * 116 + 56) for d in range(3)] == [["0"], ["1"], ["2"]]
            for row, name in enumerate(names):
                (head,) = row_heads(page, row * 116 + 56)
                assert head == name or (head[-1] == "…" and name.startswith(head[:-1]))
            # Halved, no pixel of an image is mixed with others.
            y, x = (place // 2 for place in origin(page))
            height, width = (size // 2 for size in page.contents.shape[:2])
            shown = half[y : y + height, x : x + width]
            np.testing.assert_array_equal(shown, page.contents[::2, ::2])
            assert half.shape[:2] == tuple(size // 2 for size in page.pixels.shape[:2])
