import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import draw_docs
import numpy as np
import pytest
from drawing import INK, LINE, lines_above, noise, pages_of, white_with
from PIL import Image, ImageColor

import ops
from capsnet_core import config, errors
from figures import examples, files, plots, tweaks
from inputs import datasets
from inputs.pipeline import Examples, batches

ROOT = Path(__file__).parent.parent
SLANT, THICKNESS, WIDTH, HEIGHT, POSITION = range(5)


@pytest.fixture
def saved(monkeypatch):
    """What is written, Matplotlib figures or pixels, by the names of the files."""
    found = {}
    monkeypatch.setattr(plots, "render", lambda figure: figure)
    for name in ("write_png", "write_gif"):
        monkeypatch.setattr(files, name, lambda path, picture: found.update({path.name: picture}))
    return found


# ---------------------------------------------------------------- properties of ink


def stroke(lean=0.0, thickness=3, rows=(4, 24), left=12):
    """A straight stroke, (28, 28): row by row it is moved `lean` pixels to the left."""
    image = np.zeros((28, 28))
    middle = (rows[0] + rows[1] - 1) / 2
    for y in range(*rows):
        x = left + round(lean * (middle - y))
        image[y, x : x + thickness] = 1
    return image


def test_the_slant_of_a_stroke_is_its_shear():
    for lean in (-0.5, 0, 0.25, 0.5):
        assert draw_docs.measure(stroke(lean))[SLANT] == pytest.approx(lean, abs=0.03)


def test_the_thickness_of_a_long_stroke_is_its_width_whatever_its_brightness():
    for thickness in (1, 2, 3, 4):
        long = stroke(thickness=thickness, rows=(0, 28))
        for brightness in (1, 0.2):
            assert draw_docs.measure(brightness * long)[THICKNESS] == pytest.approx(thickness)


def test_width_and_height_are_deviations_and_the_position_is_the_mean_place():
    box = np.zeros((28, 28))
    box[5:15, 8:20] = 0.7
    measured = draw_docs.measure(box)
    assert measured[WIDTH] == pytest.approx(np.std(np.arange(8, 20)))
    assert measured[HEIGHT] == pytest.approx(np.std(np.arange(5, 15)))
    assert measured[POSITION] == pytest.approx(np.mean(np.arange(8, 20)))
    assert measured[SLANT] == pytest.approx(0, abs=1e-9)
    sheared = stroke(lean=0.5)
    upright = draw_docs.measure(stroke())[WIDTH]
    assert draw_docs.measure(sheared)[WIDTH] == pytest.approx(upright, rel=0.1)


def test_an_image_without_ink_has_numbers_too():
    assert np.isfinite(draw_docs.measure(np.zeros((2, 28, 28)))).all()


def test_each_property_gets_the_dimension_that_changes_it_and_little_else():
    steps = np.linspace(-1, 1, 5)
    swept = np.zeros((6, 5, 28, 28))
    for step, t in enumerate(steps):
        apart = round(4 * t)  # two strokes that move apart: the width
        swept[0, step] = stroke(left=8 - apart) + stroke(left=17 + apart)
        swept[1, step] = stroke()  # nothing
        swept[2, step] = stroke(lean=0.4 * t)
        swept[3, step] = stroke(left=12 + round(3 * t))
        swept[4, step] = stroke(rows=(9 - round(4 * t), 19 + round(4 * t)))
        swept[5, step] = stroke(thickness=1 + round(t + 1))
    spread = np.array([0.2, 0.7, 1.5, 1.5, 1.5])
    legible = np.ones(6, bool)
    found, fit = draw_docs.name_dimensions(swept, spread, legible)
    assert found.tolist() == [2, 5, 0, 4, 3] and fit > 0.5
    legible[0] = False
    found, fit = draw_docs.name_dimensions(swept, spread, legible)
    assert found[[SLANT, HEIGHT, POSITION]].tolist() == [2, 4, 3] and found[WIDTH] != 5


def test_the_spread_of_a_position_has_the_shifts_of_a_training():
    images = np.stack([stroke(left=left) for left in (10, 12, 14)])
    spread = draw_docs.spread_of(images)
    assert spread[POSITION] == pytest.approx(np.sqrt(np.var([10, 12, 14]) + 2))
    assert spread[SLANT] == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- pictures of the network


@pytest.fixture(scope="module")
def mnist():
    return datasets.load_dataset("mnist", ROOT / "data")


@pytest.fixture(scope="module")
def network():
    import routing

    return routing.load_network((28, 28, 1), None)[0]


def test_the_animation_and_the_overview_show_the_dimensions_under_their_names(
    network, mnist, saved, monkeypatch
):
    monkeypatch.setattr(draw_docs, "TRIED", 2)
    monkeypatch.setattr(draw_docs, "MEASURED", 30)
    monkeypatch.setattr(draw_docs, "draw_sweep", lambda *args: args)
    monkeypatch.setattr(tweaks, "draw_tweak_overview", lambda *args: args)
    draw_docs.draw_capsules(network, mnist, Path("pictures"))
    originals, columns, deltas, captions = saved["sweep.gif"]
    assert columns.shape == (3, 5, 11, 28, 28, 1)
    assert deltas == pytest.approx(np.linspace(-0.25, 0.25, 11))
    for original, row, cells in zip(originals, columns, captions, strict=True):
        number = int(cells[0][1].removeprefix("no. "))
        np.testing.assert_array_equal(original, mnist.x_test[number])
        lengths, capsules = network(mnist.x_test[number][None] / np.float32(255))
        digit = mnist.y_test[number]
        for (name, dim), property_, images in zip(
            cells[1:], draw_docs.PROPERTIES, row, strict=True
        ):
            assert name == property_
            moved = np.array(capsules)
            moved[0, digit, int(dim.removeprefix("dim "))] += 0.25
            mask = np.eye(10, dtype=np.float32)[digit][None, None]
            expected = network.decoder(moved, mask).numpy()[0, 0]
            np.testing.assert_allclose(images[-1], expected, atol=1e-5)
    rows, deltas, name, heads = saved["overview.png"]
    assert rows.shape == (5, 11, 28, 28, 1)
    assert name in mnist.class_names
    assert [head.split(" (dim ")[0] for head in heads] == list(draw_docs.PROPERTIES)


def test_the_animation_has_the_original_and_each_column_below_its_caption():
    originals, images = noise(2, seed=1), noise(2, 3, 4)
    captions = [[(f"{digit}{column}", "dim") for column in range(4)] for digit in "ab"]
    pages = pages_of(
        draw_docs.draw_sweep, originals, images / 255, (-0.25, -0.1, 0, 0.25), captions
    )
    changes = [page.title.split("changed by ")[1] for page in pages]
    assert changes == ["−0.25", "−0.10", "0", "+0.25"]
    for step, page in enumerate(pages):
        tiles = {}
        for digit, row in enumerate(captions):
            y = 2 * LINE + digit * (112 + 3 * LINE)
            for column, (name, dim) in enumerate(row):
                tile = originals[digit] if column == 0 else images[digit, column - 1, step]
                x = column * (112 + 24)
                tiles[y, x] = tile
                assert lines_above(page, y, x, 112, 2) == [(name, INK), (dim, INK)]
        np.testing.assert_array_equal(page.contents, white_with(tiles))


def test_reconstructions_show_the_first_right_and_the_first_wrong_images(
    network, mnist, saved, monkeypatch
):
    monkeypatch.setattr(examples, "draw_reconstructions", lambda *args: args)
    wrong = [2, 5, *range(20, 40)]
    draw_docs.draw_reconstructions(network, mnist, wrong, Path("a.png"))
    outputs, labels, names, title = saved["a.png"]
    chosen = [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 2, 5, *range(20, 26)]
    assert names == mnist.class_names
    assert title == "Reconstructions of the first 12 right and 8 wrong test images"
    np.testing.assert_allclose(outputs.canvas, mnist.x_test[chosen] / 255, atol=1e-6)
    np.testing.assert_array_equal(labels[:, 0], mnist.y_test[chosen])
    lengths, _ = network(mnist.x_test[chosen] / np.float32(255))
    np.testing.assert_array_equal(outputs.predictions[:, 0], np.argmax(lengths, axis=1))
    assert outputs.with_label.shape == (20, 1, 28, 28, 1)


def pretend_main(monkeypatch, code=0, names=draw_docs.SINGLE):
    """Replace the run of main.py by one that writes its files; return the words it was given."""
    given = []

    def run(command, cwd):
        given.extend(command)
        words = dict(word.split("=", 1) for word in command[2:] if "=" in word)
        folder, logs = Path(words["--sample_dir"]), Path(words["--logdir"], "mnist_pretrained")
        if code == 0:
            logs.mkdir(parents=True)
            for name in names:
                (folder / name).write_text(name)
            with open(logs / "predictions.csv", "w", newline="") as file:
                rows = [["number", "label", "prediction"], [0, 7, 7], [1, 2, 3], [2, 1, 1]]
                csv.writer(file).writerows([*rows, [3, 0, 6]])
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    return given


def test_the_pictures_of_a_test_are_those_of_main_py(tmp_path, monkeypatch):
    given = pretend_main(monkeypatch)
    files, wrong = draw_docs.draw_single("some/data", tmp_path)
    assert given[:4] == [sys.executable, "main.py", "--test", "--pretrained"]
    assert wrong == [1, 3]
    assert [path.read_text() for path in files] == list(draw_docs.SINGLE)


def test_the_pictures_of_pairs_are_those_of_main_py_under_their_own_names(tmp_path, monkeypatch):
    given = pretend_main(monkeypatch, names=draw_docs.PAIRS)
    files = draw_docs.draw_pairs("some/data", tmp_path)
    assert {"--multi_MNIST", "--pretrained", "--predict=assets/pairs/*.png"} <= set(given)
    written = {path.name: path.read_text() for path in files}
    assert written == {
        "multi_MNIST.png": "multi_MNIST.png",
        "pair_predictions.png": "predictions.png",
    }


def test_the_pairs_to_try_are_the_first_test_pairs():
    mnist = datasets.load_dataset("mnist", ROOT / "data")
    padding, shift = config.MULTI_PADDING, config.MULTI_SHIFT
    data = Examples(mnist.x_test, mnist.y_test, padding, shift, True)
    digits, shifts, labels, _ = next(iter(batches(data, data.evaluation_plan().take(slice(6)), 6)))
    canvas, _ = ops.compose(digits, shifts, padding)
    assert len(list((ROOT / "assets/pairs").iterdir())) == 6
    for image, (first, second) in zip(canvas.numpy(), labels.numpy(), strict=True):
        with Image.open(ROOT / f"assets/pairs/{first}_and_{second}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.round(255 * image[..., 0]))


@pytest.mark.parametrize(
    ("test", "words"),
    [(draw_docs.draw_single, "--test --pretrained"), (draw_docs.draw_pairs, "--multi_MNIST")],
)
def test_a_test_that_fails_is_said(tmp_path, monkeypatch, test, words):
    pretend_main(monkeypatch, code=1)
    with pytest.raises(errors.UserError, match=f"{words}.* failed, its message is above"):
        test("data", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- pictures of results


def test_the_bars_of_speed_are_the_milliseconds_of_the_tables(tmp_path, saved):
    (tmp_path / "page.md").write_text(
        "# Page\n\n| train step, with deformation, batch 64 | ms | peak MB |\n| --- | --- | --- |\n"
        "| PyTorch, plain | 1,200 | 5 |\n| PyTorch, channels_last, torch.compile | 300 | 6 |\n"
        "| this tool, float32 | 200 | 7 |\n| this tool, mixed_bfloat16 | 1 | 8 |\n\nText.\n\n"
        "| inference, batch 64 | ms | peak MB |\n| --- | --- | --- |\n"
        "| PyTorch, plain | 400 | 5 |\n| this tool, float32 | 80 | 7 |\n\nMore.\n"
    )
    draw_docs.draw_speed(tmp_path / "page.md", tmp_path / "speed.png")
    panels = saved["speed.png"].axes
    widths = [[bar.get_width() for bar in panel.patches] for panel in panels]
    assert widths == [[1200, 300, 200], [400, 80]]
    assert [text.get_text() for text in panels[0].texts] == ["1,200", "300", "200"]
    assert [panel.get_xlabel() for panel in panels] == ["ms", "ms"]
    bottom, top = panels[0].get_ylim()
    assert bottom > top  # the first bar is the upper one
    colors = [tuple(round(255 * c) for c in bar.get_facecolor()[:3]) for bar in panels[0].patches]
    assert colors[2] == ImageColor.getrgb(plots.LINE_COLORS[0])  # the tool's own
    assert colors[0] == colors[1] != colors[2]
    names = [label.get_text().replace("\n", " ") for label in panels[0].get_yticklabels()]
    assert names == [
        "PyTorch, plain",
        "PyTorch, channels_last, torch.compile",
        "this tool, float32",
    ]
    titles = [panel.get_title("left") for panel in panels]
    assert titles == ["Training step, 64 images", "Inference, 64 images"]


def test_a_page_without_the_tables_is_said(tmp_path):
    (tmp_path / "page.md").write_text("# Nothing\n")
    with pytest.raises(errors.UserError, match="lacks a table"):
        draw_docs.draw_speed(tmp_path / "page.md", tmp_path / "speed.png")


def test_the_results_of_the_experiments_are_drawn_from_their_files(tmp_path, saved):
    draw_docs.draw_results(tmp_path)
    assert set(saved) == {"affine.png", "routing.png", "speed.png"}
    left = saved["affine.png"].axes[0]
    assert left.get_ylabel() == "accuracy (%)"
    outcomes = json.loads((ROOT / "results/experiments/affine.json").read_text())
    assert list(left.lines[0].get_ydata()) == outcomes["capsnet"]["sweeps"]["rotation"]
    watched = json.loads((ROOT / "results/experiments/routing.json").read_text())
    assert list(saved["routing.png"].axes[0].lines[0].get_ydata()) == watched["changes"]


def test_every_picture_of_the_documentation_is_used_and_whole():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for path in (ROOT / "assets").iterdir():
        if path.suffix in {".png", ".gif", ".svg"}:
            assert f"assets/{path.name}" in text, path
        if path.suffix in {".png", ".gif"}:
            with Image.open(path) as picture:
                picture.load()


# ---------------------------------------------------------------- the tour


def texts_of(notebook):
    """Return what each code cell of a notebook printed, and how many pictures it drew."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = [output.text for output in cell.outputs if output.output_type == "stream"]
            pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
            found.append(("".join(printed), pictures))
    return found


def test_the_tour_runs_and_was_saved_with_the_outputs_of_these_weights():
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    saved = nbformat.read(draw_docs.TOUR, as_version=4)
    run = draw_docs.run_tour(draw_docs.TOUR)
    # If the weights are others, run: python experiments/draw_docs.py
    assert texts_of(run) == texts_of(saved)
    assert sum(pictures for _, pictures in texts_of(saved)) == 5
    assert [cell.source for cell in run.cells] == [cell.source for cell in saved.cells]
    text = draw_docs.TOUR.read_text(encoding="utf-8")
    assert len(text) < 2e6
    assert not re.search(r"site-packages|/(home|root|tmp|work|Users)/", text)  # of no machine
