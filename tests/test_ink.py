import csv
import math

import numpy as np
import pytest
from PIL import Image
from story import DATA, ROOT, first_images, load_all, run

from inputs import datasets, ink

MNIST_LIKE = ink.InkStyle(light_ink=True, box=20, by_mass=True, offset=(0.5, 0.5), stroke=2.6)
SHAPE = (28, 28, 1)


@pytest.fixture(scope="module")
def mnist():
    return load_all("mnist", ROOT / "data")


# ---------------------------------------------------------------- drawing


def bar(shape, start, end, width):
    """A straight stroke with round ends: (H, W) floats from 0 to 1."""
    y, x = np.indices(shape)
    (y0, x0), (y1, x1) = start, end
    length = math.hypot(y1 - y0, x1 - x0)
    along = np.clip(((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / max(length, 1e-9) ** 2, 0, 1)
    distance = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
    return np.clip(width / 2 + 0.5 - distance, 0, 1)


def disk(shape, centre, radius):
    return bar(shape, centre, centre, 2 * radius)


def ring(shape, centre, radius, width):
    y, x = np.indices(shape)
    distance = np.abs(np.hypot(y - centre[0], x - centre[1]) - radius)
    return np.clip(width / 2 + 0.5 - distance, 0, 1)


def on_paper(strokes, paper=255, color=0, noise=0.0, seed=0):
    """Draw strokes in a colour on paper, which may be a picture: uint8 (H, W, C)."""
    strokes = strokes[..., None]
    page = strokes * np.atleast_1d(color) + (1 - strokes) * np.atleast_1d(paper)
    page = page + np.random.default_rng(seed).normal(0, noise, page.shape) if noise else page
    return np.clip(np.rint(page), 0, 255).astype(np.uint8)


def letter(shape, top, left, size, width):
    """A tall L: a long and a short bar that meet. Its outer edges are `size` and `size // 2`."""
    half = width / 2
    bottom, right = top + size - 1 - half, left + size // 2 - 1 - half
    return np.maximum(
        bar(shape, (top + half, left + half), (bottom, left + half), width),
        bar(shape, (bottom, left + half), (bottom, right), width),
    )


def slope(shape, low, high):
    """Paper that is `low` at the left and `high` at the right, (H, W, 1)."""
    return np.broadcast_to(np.linspace(low, high, shape[1]), shape)[..., None]


def placed(image, style=MNIST_LIKE):
    return ink.place(ink.isolate(image).strokes, style, SHAPE)[..., 0]


def box_of(image, least=51):
    """Return top, bottom, left and right of what is at least so light, pixel by pixel."""
    inked = [(y, x) for y in range(image.shape[0]) for x in range(image.shape[1])
             if image[y, x] >= least]  # fmt: skip
    rows, columns = zip(*inked, strict=True)
    return min(rows), max(rows), min(columns), max(columns)


def centre_of_mass(image):
    total = down = right = 0.0
    for (y, x), value in np.ndenumerate(image):
        total, down, right = total + value, down + y * float(value), right + x * float(value)
    return down / total, right / total


def assert_placed(image, height=20, width=10):
    """Check that light ink has about these sides, and its mass where MNIST has it."""
    top, bottom, left, right = box_of(image)
    assert abs(bottom - top + 1 - height) <= 1 and abs(right - left + 1 - width) <= 2
    assert np.abs(np.array(centre_of_mass(image)) - 14).max() < 0.75
    assert image.max() > 200 and image[0].max() == 0


PAPERS = {
    "white": {},
    "grey": {"paper": 170, "color": 60},
    "dark, with dark ink": {"paper": 100, "color": 20},
    "lit from the right": {"paper": slope((300, 300), 130, 230), "color": 40},
    "noisy": {"paper": 200, "color": 70, "noise": 8},
    "pencil": {"paper": 235, "color": 180, "noise": 4},
    "blue ink on yellow": {"paper": (240, 220, 150), "color": (30, 50, 160), "noise": 4},
    "red ink as light as its paper": {"paper": (150, 150, 150), "color": (255, 110, 105)},
    "chalk": {"paper": 40, "color": 220, "noise": 6},
    "chalk on a light board": {"paper": 140, "color": 250},
    "white on black": {"paper": 0, "color": 255},
}
LIGHT_INK = {
    *("red ink as light as its paper", "chalk", "chalk on a light board", "white on black")
}


# ---------------------------------------------------------------- taking ink off its paper


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize(("top", "left"), [(90, 110), (4, 5), (150, 220)])
def test_ink_anywhere_on_any_paper_is_found_and_placed_like_mnists(paper, top, left):
    page = on_paper(letter((300, 300), top, left, 130, 14), **PAPERS[paper])
    isolated = ink.isolate(page)
    assert isolated.light == (paper in LIGHT_INK)
    assert np.abs(np.array(isolated.size) - (130, 65)).max() <= 6
    assert isolated.strokes.min() >= 0 and isolated.strokes.max() <= 1
    assert_placed(ink.place(isolated.strokes, MNIST_LIKE, SHAPE)[..., 0])


@pytest.mark.parametrize("size", [20, 60, 200, 1000])
def test_the_size_of_the_drawing_and_of_the_page_make_no_difference(size):
    shape = (size * 3, size * 2)
    page = on_paper(letter(shape, size, size // 3, size, size / 8))
    height, width = ink.isolate(page).size
    assert abs(height - size) <= max(2, 0.04 * size)
    assert abs(width - size // 2) <= max(2, 0.04 * size)
    assert_placed(placed(page))


def test_a_small_digit_on_a_large_photograph_is_looked_at_closely():
    shape = (1500, 2000)
    small = letter(shape, 1200, 1700, 100, 11)
    page = on_paper(small, slope(shape, 210, 150), 40, noise=7)
    isolated = ink.isolate(page)
    assert np.abs(np.array(isolated.size) - (100, 50)).max() <= 5
    assert isolated.strokes.shape[0] > 90  # not those of the page reduced to 400 pixels: 20
    assert_placed(placed(page))


def test_disks_rings_and_bars_keep_their_form():
    shape = (200, 200)
    for strokes, area in {
        "disk": (disk(shape, (60, 70), 30), math.pi * 10**2),
        "ring": (ring(shape, (90, 100), 40, 12), math.pi * (10**2 - (10 * 34 / 46) ** 2)),
        "bar": (bar(shape, (50, 30), (50, 130), 16), 20 * 20 * 16 / 116),
    }.values():
        image = placed(on_paper(strokes))
        assert abs((image / 255).sum() / area - 1) < 0.25
    image = placed(on_paper(ring(shape, (90, 100), 40, 12)))
    assert image[13:16, 13:16].max() < 60  # still open in the middle


def test_specks_are_dropped_and_second_strokes_are_kept():
    shape = (300, 300)
    strokes = letter(shape, 80, 100, 120, 14)
    clean = placed(on_paper(strokes))
    dust = strokes.copy()
    for y, x in np.random.default_rng(1).integers(5, 290, (12, 2)):
        dust[y : y + 3, x : x + 3] = 1
    assert np.abs(placed(on_paper(dust)).astype(float) - clean).mean() < 4
    # A dash above, as in a 5 whose upper stroke does not touch the rest.
    second = np.maximum(strokes, bar(shape, (50, 107), (50, 150), 14))
    image = placed(on_paper(second))
    assert ink.isolate(on_paper(second)).size[0] == pytest.approx(200 - 43, abs=6)
    top, _, left, right = box_of(image)
    assert right - left >= 5 and image[top + 1].max() > 200
    assert image[top + 3].max() < 60  # the gap between both


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (28, 28), (90, 300), (600, 600)])
def test_a_page_without_ink_has_none(shape):
    for value in (0, 128, 255):
        assert ink.isolate(np.full((*shape, 1), value, np.uint8)) is None
    assert ink.isolate(np.full((*shape, 3), (240, 220, 150), np.uint8)) is None
    blank = np.zeros(shape)
    if min(shape) >= 28:
        assert ink.isolate(on_paper(blank, 200, noise=6)) is None
        assert ink.isolate(on_paper(blank, slope(shape, 150, 230), noise=6)) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (40, 1, 1), (2, 2, 1), (3, 500, 3)])
def test_pictures_of_odd_sizes_do_no_harm(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    isolated = ink.isolate(image)
    if isolated is not None:
        assert ink.place(isolated.strokes, MNIST_LIKE, SHAPE).shape == SHAPE


def test_otsus_threshold_is_the_best_of_all():
    stream = np.random.default_rng(0)
    for first, second, share in (0.2, 0.7, 0.5), (0.1, 0.3, 0.9), (0.6, 0.9, 0.2):
        many = stream.random(3000) < share
        values = np.clip(np.where(many, first, second) + stream.normal(0, 0.05, 3000), 0, 1)

        def within(threshold, values=values):
            low, high = values[values < threshold], values[values >= threshold]
            return sum(part.size * part.var() for part in (low, high) if part.size)

        best = min(within(k / 256) for k in range(1, 256))
        assert within(ink.otsu_threshold(values)) <= 1.001 * best
    assert ink.otsu_threshold(np.full(9, 0.25)) == 0.25


# ---------------------------------------------------------------- placing


def test_ink_is_placed_by_its_mass_or_by_its_bounding_box():
    strokes = np.zeros((40, 40), np.float32)
    strokes[:8], strokes[:, :8] = 1, 1  # the mass is above and left of the middle
    by_mass = ink.place(strokes, MNIST_LIKE, SHAPE)[..., 0]
    assert np.abs(np.array(centre_of_mass(by_mass)) - 14).max() <= 0.5
    style = MNIST_LIKE._replace(by_mass=False, offset=(0.0, 0.0))
    by_box = ink.place(strokes, style, SHAPE)[..., 0]
    assert box_of(by_box) == (4, 23, 4, 23)
    assert centre_of_mass(by_box)[0] < 12


def test_dark_ink_on_a_light_background_is_the_negative():
    strokes = ink.isolate(on_paper(letter((100, 100), 20, 30, 50, 7))).strokes
    light = ink.place(strokes, MNIST_LIKE, SHAPE)
    dark = ink.place(strokes, MNIST_LIKE._replace(light_ink=False), SHAPE)
    assert np.abs(255.0 - light - dark).max() <= 1 and light[0].max() == 0


def test_another_box_on_another_canvas_is_filled_too():
    strokes = ink.isolate(on_paper(letter((200, 200), 20, 30, 150, 20))).strokes
    image = ink.place(strokes, MNIST_LIKE._replace(box=12, stroke=1.5), (40, 50, 1))
    assert image.shape == (40, 50, 1) and image.dtype == np.uint8
    top, bottom, *_ = box_of(image[..., 0])
    assert abs(bottom - top + 1 - 12) <= 1
    down, right = centre_of_mass(image[..., 0])
    assert abs(down - 20) <= 0.75 and abs(right - 25) <= 0.75


@pytest.mark.parametrize("size", [(300, 6), (6, 300), (200, 200), (90, 300), (1, 50), (50, 1)])
@pytest.mark.parametrize("by_mass", [False, True])
def test_ink_of_any_proportions_fits_into_a_wide_image(size, by_mass):
    wide = MNIST_LIKE._replace(box=110, by_mass=by_mass, offset=(0, 0), stroke=3)
    strokes = np.ones(size)
    strokes[: size[0] // 2, : size[1] // 2] = 0.3  # its mass is not in the middle
    image = ink.place(strokes, wide, (32, 128, 1))
    rows, columns = (np.flatnonzero((image[..., 0] > 25).any(axis=axis)) for axis in (1, 0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    scale = min(110 / max(size), 32 / size[0], 128 / size[1])
    if min(size) > 6:  # thinner strokes are widened
        assert abs(height - size[0] * scale) <= 1 and abs(width - size[1] * scale) <= 1
    assert abs(max(height / 32, width / 110) - 1) < 0.12  # as large as can be


def test_a_thin_pen_is_widened_and_a_thick_one_is_not():
    shape = (400, 400)
    thin, usual, thick = (
        placed(on_paper(letter(shape, 60, 100, 260, width))) / 255 for width in (4, 34, 60)
    )
    # The upper half of an L is one bar: its mass in a row is its width.
    widths = [image[8:14].sum(axis=1).mean() for image in (thin, usual, thick)]
    assert 1.2 < widths[0] < 3 and thin.max() > 0.98
    assert widths[1] == pytest.approx(34 / 13, rel=0.2)
    assert widths[2] == pytest.approx(60 / 13, rel=0.2)


# ---------------------------------------------------------------- how a data set places its ink


def test_the_width_of_strokes_is_that_of_bars_and_rings():
    shape = (220, 220)
    for width in (4, 9, 20):
        estimates = []
        for angle in np.arange(0, 180, 7.5):
            step = 80 * np.array([math.sin(math.radians(angle)), math.cos(math.radians(angle))])
            estimates.append(ink.stroke_width(bar(shape, 110 - step, 110 + step, width)))
        # The outline of a bar also has two ends, which make it look narrower.
        assert np.mean(estimates) == pytest.approx(width, rel=0.12)
        # Along the axes the steps of the outline are its length, not 4/π of it; and a pixel that
        # is covered in part counts or not.
        assert max(estimates) < 4 / math.pi * (width + 1)
        assert min(estimates) > 0.75 * width
        assert ink.stroke_width(ring(shape, (110, 110), 70, width)) == pytest.approx(
            width, rel=0.08
        )
    assert ink.stroke_width(np.zeros((5, 5))) == 0


def test_mnist_has_light_ink_in_a_box_of_20_pixels_placed_by_its_mass(mnist):
    for images in (mnist.x_train, mnist.x_train[:400], mnist.x_test):
        style = ink.measure_style(images)
        assert (style.light_ink, style.box, style.by_mass) == (True, 20, True)
        # "the center of mass of the pixels is at the center of the 28x28 field": pixel 14.
        centres = [centre_of_mass(image[..., 0]) for image in images[:50]]
        assert style.offset == pytest.approx(np.mean(centres, axis=0) - 13.5, abs=0.1)
        assert 2 < style.stroke < 3.5
    negative = ink.measure_style(255 - mnist.x_train[:1000])
    expected = ink.measure_style(mnist.x_train[:1000])
    assert not negative.light_ink and negative[1:3] == expected[1:3]


def test_ink_that_a_set_centres_by_its_bounding_box_is_noticed(mnist):
    moved = np.zeros((200, 28, 28, 1), np.uint8)
    for image, digit in zip(moved, mnist.x_train, strict=False):
        top, bottom, left, right = box_of(digit[..., 0])
        part = digit[top : bottom + 1, left : right + 1]
        y, x = (28 - part.shape[0]) // 2, (28 - part.shape[1]) // 2
        image[y : y + part.shape[0], x : x + part.shape[1]] = part
    style = ink.measure_style(moved)
    assert not style.by_mass and style.box == 20 and np.abs(style.offset).max() < 0.6


def test_images_that_are_no_ink_have_no_style(mnist):
    stream = np.random.default_rng(0)
    digits = mnist.x_train[:100]
    # MNIST's margins are wide enough for these: nothing is at an edge.
    anywhere = np.stack([np.roll(d, stream.integers(-2, 3, 2), (0, 1)) for d in digits])
    of_two_sizes = digits.copy()
    of_two_sizes[::2] = np.pad(digits[::2, ::2, ::2], ((0, 0), (7, 7), (7, 7), (0, 0)))
    on_grey = 40 + digits // 2
    solid = np.zeros((100, 28, 28, 1), np.uint8)
    solid[:, 4:24, 6:22] = 200
    filling = np.zeros((100, 28, 28, 1), np.uint8)
    filling[:, :, 8:20] = 200
    for images in (
        stream.integers(0, 256, (100, 28, 28, 1), np.uint8),  # photographs
        digits.repeat(3, -1),
        np.where(np.arange(100)[:, None, None, None] % 2, digits, 255 - digits),
        anywhere,
        of_two_sizes,
        on_grey,
        solid,
        filling,
        np.zeros_like(digits),
        digits[:3],  # too few to tell
    ):
        assert ink.measure_style(images.astype(np.uint8)) is None


def test_an_image_follows_a_style_if_its_size_background_and_place_do(mnist):
    digits = mnist.x_test[:500]
    assert np.mean([ink.follows(digit, MNIST_LIKE) for digit in digits]) > 0.97
    assert not any(ink.follows(255 - digit, MNIST_LIKE) for digit in digits)
    dark = MNIST_LIKE._replace(light_ink=False)
    assert np.mean([ink.follows(255 - digit, dark) for digit in digits]) > 0.97
    digit = digits[0]
    assert not ink.follows(np.roll(digit, 3, axis=1), MNIST_LIKE)
    assert not ink.follows(np.roll(digit, -3, axis=0), MNIST_LIKE)
    halved = np.pad(digit[::2, ::2], ((7, 7), (7, 7), (0, 0)))
    assert not ink.follows(halved, MNIST_LIKE)
    assert not ink.follows(np.zeros_like(digit), MNIST_LIKE)


# ---------------------------------------------------------------- to the prediction


def redrawn(digit, stream):
    """Redraw a digit as people scan or photograph their own: pages by the name of their kind."""
    large = np.asarray(Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC)) / 255
    top, bottom, left, right = box_of(digit)
    crop = large[10 * top : 10 * bottom + 10, 10 * left : 10 * right + 10]

    def page(height, width, y, x):
        strokes = np.zeros((height, width))
        strokes[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        return strokes

    light = slope((280, 280), 170, 230)
    return {
        "tight": on_paper(np.pad(crop, 8)),
        "small": on_paper(page(600, 600, 300, 250)),
        "corner": on_paper(page(400, 400, 20, 20)),
        "uneven": on_paper(large, light, 70, noise=6, seed=stream.integers(99)),
        "coloured": on_paper(large, (240, 220, 150), (30, 50, 160), noise=5),
        "chalk": on_paper(large, 45, 215, noise=8),
        "wide": on_paper(page(300, 900, 40, int(stream.integers(20, 600)))),
    }


def test_redrawn_digits_are_recognized(mnist, tmp_path, monkeypatch):
    few = first_images(mnist, 1000, 100)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: few)
    stream, labels = np.random.default_rng(5), {}
    for number in range(30):
        for kind, page in redrawn(mnist.x_test[number, ..., 0], stream).items():
            labels[f"{kind}{number}.png"] = str(mnist.y_test[number])
            Image.fromarray(np.squeeze(page)).save(tmp_path / f"{kind}{number}.png")
    assert run(tmp_path, "--predict=*.png", "--pretrained", DATA).code == 0
    with open(tmp_path / "samples/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(labels) == 210
    assert all(row["done"].startswith("ink of ") for row in rows)
    right = [row["class_1"] == labels[row["file"]] for row in rows]
    assert np.mean(right) >= 0.95
