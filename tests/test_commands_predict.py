import contextlib
import csv
import io
import os
import re

import numpy as np
import pytest
from PIL import Image
from story import (
    DATA,
    ROOT,
    Command,
    assert_refused,
    decode,
    load_all,
    run,
    save_checkpoint,
    small_network,
    varied_network,
    weights_of,
)

import main
import utils
from capsnet_core.errors import UserError
from commands.predict import (
    caption,
    classify,
    in_words,
    matching_files,
    predict,
    read_pictures,
)
from inputs import datasets, ink
from inputs.appearance import KEY, compose_pairs, measure_appearance
from inputs.pipeline import Examples

pytest_plugins = ["story_fixtures"]


@pytest.fixture
def trained(tmp_path, few, monkeypatch):
    """The working folder, with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "checkpoint/mnist", varied_network())
    return tmp_path


def save(path, image):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image).save(path)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


# ---------------------------------------------------------------- which files


def test_a_pattern_names_files_in_their_order_and_not_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.png", "in/a.png", "in/deep/c.png", "in/[x].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    assert matching_files("in/*") == ["in/[x].png", "in/a.png", "in/b.png"]
    assert matching_files("in/[x].png") == ["in/[x].png"]  # a name before a pattern
    assert matching_files("in/**/*.png") == [
        *("in/[x].png", "in/a.png", "in/b.png", "in/deep/c.png")
    ]
    (tmp_path / "in[1]").mkdir()
    for name in "ab":
        (tmp_path / "in[1]" / f"{name}[2].png").write_text("")
    assert matching_files("in[1]/*.png") == ["in[1]/a[2].png", "in[1]/b[2].png"]
    assert matching_files("in/[ab].png") == ["in/a.png", "in/b.png"]  # a pattern before names
    monkeypatch.setenv("HOME", str(tmp_path))
    assert matching_files("~/in/a*") == [f"{tmp_path}/in/a.png"]


def test_a_pattern_without_files_is_refused_before_anything_is_trained(tmp_path, few):
    (tmp_path / "odd").mkdir()
    for pattern, words in {
        "*.png": ["--predict=*.png matches no file", "quote"],
        "odd": ["is a folder", "'odd/*'"],
        "odd/*": ["matches no file"],
    }.items():
        assert_refused(run(tmp_path, "--train", f"--predict={pattern}", DATA), 1, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_a_pattern_that_the_shell_replaced_is_pointed_out(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("")
    refusal = run(tmp_path, "--predict", "a.png", "b.png", DATA)
    assert_refused(refusal, 2, "'b.png'", "the shell", "quoted")
    refusal = run(tmp_path, "--predict", "a.png", "c.png", DATA)
    assert_refused(refusal, 2, "'c.png'", "expected only flags")


# ---------------------------------------------------------------- how they are read


def read(*paths, x_train, **options):
    """Read image files for a network trained on images: the Pictures, and what failed."""
    data = Examples(x_train, np.zeros(len(x_train), np.int32))
    appearance = measure_appearance(data, **options)
    return read_pictures(paths, x_train.shape[1:], appearance)[:2]


@pytest.mark.parametrize("light_training", [False, True, None])
@pytest.mark.parametrize("light_image", [False, True])
def test_an_image_is_inverted_only_if_its_background_is_not_that_of_the_training(
    tmp_path, few, light_training, light_image
):
    x_train = few.x_train.copy()
    if light_training is None:
        x_train[::2] = 255 - x_train[::2]
    elif light_training:
        x_train = 255 - x_train
    digit = few.x_test[0, ..., 0]
    image = 255 - digit if light_image else digit
    save(tmp_path / "digit.png", image)
    (picture,), failed = read(tmp_path / "digit.png", x_train=x_train)
    inverted = light_training is not None and light_training != light_image
    assert picture.path == tmp_path / "digit.png"
    assert picture.done == ("inverted" if inverted else "unchanged")
    np.testing.assert_array_equal(picture.image[..., 0], 255 - image if inverted else image)
    np.testing.assert_array_equal(picture.original[..., 0], image)
    assert failed == []


def test_colour_images_are_never_inverted(tmp_path):
    dark = np.zeros((10, 28, 28, 3), np.uint8)
    save(tmp_path / "light.png", np.full((28, 28, 3), (250, 240, 230), np.uint8))
    (picture,), _ = read(tmp_path / "light.png", x_train=dark)
    assert picture.done == "unchanged" and picture.image[0, 0].tolist() == [250, 240, 230]


def enlarged(digit, scale=3):
    """Return a digit (28, 28) as dark ink on a light page that is three times as wide as high."""
    return 255 - np.pad(digit, ((0, 0), (28, 28))).repeat(scale, 0).repeat(scale, 1)


def test_the_ink_of_an_image_is_placed_as_the_training_images_have_it(tmp_path, few):
    digit = few.x_test[4, ..., 0]
    grey = enlarged(digit)
    save(tmp_path / "a.png", np.stack([grey, grey, grey // 2 + 127], -1))
    (picture,), _ = read(tmp_path / "a.png", x_train=few.x_train)
    words = re.fullmatch(
        r"ink of (\d+)×(\d+) pixels taken off light paper of 252×84, scaled and centred",
        picture.done,
    )
    height, width = (3 * np.count_nonzero((digit > 100).any(axis=axis)) for axis in (1, 0))
    assert abs(int(words[1]) - width) <= 6 and abs(int(words[2]) - height) <= 6
    assert picture.image.shape == (28, 28, 1) and picture.image.dtype == np.uint8
    # It is where it came from: at any other place it differs more from the digit.
    differences = {
        (y, x): np.abs(np.roll(picture.image[..., 0] / 255, (y, x), (0, 1)) - digit / 255).mean()
        for y in range(-3, 4)
        for x in range(-3, 4)
    }
    assert min(differences, key=differences.get) == (0, 0) and differences[0, 0] < 0.05


def test_ink_on_dark_paper_is_said_to_be_so(tmp_path, few):
    save(tmp_path / "a.png", 255 - enlarged(few.x_test[4, ..., 0]))
    (picture,), _ = read(tmp_path / "a.png", x_train=few.x_train)
    assert "off dark paper of 252×84" in picture.done


@pytest.mark.parametrize("kind", ["photographs", "clothes", "colours"])
def test_an_image_is_fitted_as_a_whole_if_the_training_images_are_no_ink(tmp_path, few, kind):
    stream = np.random.default_rng(0)
    if kind == "photographs":
        images = stream.integers(0, 256, (100, 28, 28, 1), np.uint8)
    elif kind == "clothes":  # solid, and as large as the image
        images = np.zeros((100, 28, 28, 1), np.uint8)
        for image in images:
            image[: stream.integers(20, 29), 4 : stream.integers(18, 25)] = 180
    else:
        images = few.x_train[:100].repeat(3, -1)
    page = enlarged(few.x_test[4, ..., 0])
    save(tmp_path / "a.png", page)
    (picture,), _ = read(tmp_path / "a.png", x_train=images)
    whole, words = utils.fit_image(page[..., None], images.shape[1:], kind == "clothes")
    assert picture.done == words and "filled up at its edges, resized from 252×84" in words
    np.testing.assert_array_equal(picture.image, whole)


def test_a_page_without_ink_is_fitted_as_a_whole(tmp_path, few):
    save(tmp_path / "a.png", np.full((60, 90), 230, np.uint8))
    (picture,), _ = read(tmp_path / "a.png", x_train=few.x_train)
    assert picture.done == "inverted, filled up at its edges, resized from 90×60"
    assert (picture.image == 25).all()


def test_a_large_file_is_kept_small_for_the_sheet(tmp_path, few):
    page = np.full((600, 900, 3), (240, 230, 200), np.uint8)
    page[200:400, 300:320] = (20, 40, 160)
    save(tmp_path / "a.png", page)
    (picture,), _ = read(tmp_path / "a.png", x_train=few.x_train)
    height, width, channels = picture.original.shape
    assert channels == 3 and width < 300 and abs(height / width - 2 / 3) < 0.01
    assert picture.original[0, 0].tolist() == [240, 230, 200]


def test_grey_of_12_bits_in_16_is_scaled_by_the_range_of_all_files_or_of_the_training(
    tmp_path, few
):
    bright, dark = few.x_test[0], few.x_test[1] // 3
    paths = [tmp_path / "bright.png", tmp_path / "dark.png"]
    for path, image in zip(paths, (bright, dark), strict=True):
        save(path, image[..., 0].astype(np.uint16) * 16)  # up to 4080, and to 1360
    pictures, failed = read(*paths, x_train=few.x_train)
    for picture, image in zip(pictures, (bright, dark), strict=True):
        assert np.abs(picture.image - np.rint(image * (16 / 4095 * 255))).max() <= 1
    assert failed == []
    # On its own the dark file does not say what is white, but the training images do.
    ((_, error),) = read(paths[1], x_train=few.x_train)[1]
    assert "grey of 16 bits from 0 to 1360 in 1 files" in str(error)
    for white in 4095, 65535:
        ((picture,), failed) = read(paths[1], x_train=few.x_train, white=white)
        assert failed == [] and abs(picture.original.max() - 255 * 1360 / white) <= 1


def test_an_unforeseen_error_of_one_file_is_named_and_the_others_are_read(
    tmp_path, few, monkeypatch
):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        save(path, np.roll(few.x_test[number, ..., 0], 9, 0))
    place = ink.place

    def fail(strokes, *args):
        if fail.calls.append(1) or len(fail.calls) == 2:
            raise IndexError("out of bounds")
        return place(strokes, *args)

    fail.calls = []
    monkeypatch.setattr(ink, "place", fail)
    pictures, ((path, error),) = read(*paths, x_train=few.x_train)
    assert [picture.path for picture in pictures] == [paths[0], paths[2]] and path == paths[1]
    assert str(error) == f"{path} cannot be made to fit (out of bounds)"


def test_the_classes_of_images_are_those_of_the_network(few):
    network = varied_network()
    lengths, decoded = classify(network, few.x_test[:6])
    expected, capsules = (part.numpy() for part in network(few.x_test[:6] / np.float32(255)))
    np.testing.assert_allclose(lengths, expected, atol=1e-6)
    of_longest = decode(network, capsules, expected.argmax(axis=1))
    np.testing.assert_allclose(decoded[:, 0], of_longest, atol=1e-5)
    _, decoded = classify(network, few.x_test[:6], per_example=2)
    assert decoded.shape == (6, 2, 28, 28, 1)
    for place in (0, 1):
        of_place = decode(network, capsules, np.argsort(-expected, axis=1)[:, place])
        np.testing.assert_allclose(decoded[:, place], of_place, atol=1e-5)


def test_of_pairs_the_two_longest_capsules_are_named_first():
    best = [("7", 0.912), ("1", 0.5), ("9", 0.25)]
    assert in_words(best, 1) == "7: 0.912, 1: 0.500, 9: 0.250"
    assert in_words(best, 2) == "7 and 1 (7: 0.912, 1: 0.500, 9: 0.250)"


def test_a_caption_is_the_name_of_the_file_and_the_classes_with_their_lengths():
    best = [("7", 0.912), ("1", 0.5), ("9", 0.25)]
    assert caption("in/x.png", best, tuple("0123456789")) == ["x.png", "7: 0.91  1: 0.50  9: 0.25"]
    best = [("Ankle boot", 0.912), ("Bag", 0.5)]
    lines = ["x.png", "Ankle boot: 0.91", "Bag: 0.50"]
    assert caption("in/x.png", best, ("Ankle boot", "Bag")) == lines


# ---------------------------------------------------------------- the command


def test_predictions_are_those_of_the_network_in_the_order_of_the_files(trained, few, drawn):
    for number in range(20):  # more than are computed at a time
        save(trained / f"in/{number:02}.png", few.x_test[number, ..., 0])
    save(trained / "in/20.png", 255 - few.x_test[20, ..., 0])
    result = run(trained, "--predict=in/*.png", DATA, "--sample_dir=out")
    assert result.code == 0 and result.err == ""
    network, images = varied_network(), few.x_test[:21]
    lengths, capsules = (part.numpy() for part in network(images / np.float32(255)))
    head, *rows = read_csv(trained / "out/predictions.csv")
    assert head == [
        *("file", "done", "class_1", "length_1", "class_2", "length_2", "class_3", "length_3")
    ]
    assert len(rows) == 21
    printed = [line for line in result.out.splitlines() if line.startswith(("in/", "Wrote"))]
    for number, (row, scores) in enumerate(zip(rows, lengths, strict=True)):
        best = np.argsort(-scores)[:3]
        done = "inverted" if number == 20 else "unchanged"
        assert row[:2] == [f"in/{number:02}.png", done]
        assert row[2::2] == [str(k) for k in best]
        np.testing.assert_allclose(np.float64(row[3::2]), scores[best], atol=1e-5)
        said = ", ".join(f"{k}: {scores[k]:.3f}" for k in best)
        assert printed[number] == f"in/{number:02}.png ({done}): {said}"
    originals, shown, reconstructions, captions = drawn["out/predictions.png"]
    for original, image in zip(originals[:20], images[:20], strict=True):
        np.testing.assert_array_equal(original, image)
    np.testing.assert_array_equal(originals[20], 255 - images[20])
    np.testing.assert_array_equal(shown, images)
    of_longest = decode(network, capsules, lengths.argmax(axis=1))
    np.testing.assert_allclose(np.stack(reconstructions)[:, 0], of_longest, atol=1e-4)
    first = np.argsort(-lengths[20])[0]
    assert captions[20][0] == "20.png" and captions[20][1].startswith(
        f"{first}: {lengths[20, first]:.2f}"
    )
    assert printed[-1] == "Wrote out/predictions.csv, out/predictions.png"


def test_the_sheet_of_predictions_is_a_picture(trained, few):
    save(trained / "a.png", few.x_test[0, ..., 0])
    assert run(trained, "--predict=a.png", DATA).code == 0
    with Image.open(trained / "samples/predictions.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 100


def test_files_that_cannot_be_read_do_not_keep_the_others_from_being_predicted(trained, few):
    for name in ("a.png", "c.png"):
        save(trained / name, few.x_test[0, ..., 0])
    (trained / "b.png").write_text("no image")
    result = run(trained, "--predict=*.png", DATA)
    assert_refused(result, 1, "1 of 3 files could not be read: b.png")
    rows = read_csv(trained / "samples/predictions.csv")
    assert [row[0] for row in rows[1:]] == ["a.png", "c.png"]
    assert "a.png (unchanged): " in result.out and "c.png (unchanged): " in result.out
    (trained / "samples/predictions.csv").unlink()
    for name in ("a.png", "c.png"):
        (trained / name).unlink()
    assert_refused(run(trained, "--predict=*.png", DATA), 1, "1 of 1 files could not be read")
    assert not (trained / "samples/predictions.csv").exists()


def test_frames_and_bits_of_the_files_are_noted_before_the_predictions(trained, few):
    digit = few.x_test[0, ..., 0]
    save(trained / "a.png", digit.astype(np.uint16) * 16)
    frames = [Image.fromarray(digit), Image.fromarray(255 - digit)]
    frames[0].save(trained / "b.gif", save_all=True, append_images=frames[1:])
    result = run(trained, "--predict=[ab].*", DATA)
    assert result.code == 0
    lines = result.out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("a.png ("))
    assert lines[first - 2 : first] == [
        "grey of 16 bits from 0 to 4095 in 1 of 2 files, scaled to 0 to 255",
        "1 of 2 files have several frames or pages, the first is used",
    ]
    assert lines[first + 1].startswith("b.gif (unchanged): ")


def test_two_classes_have_two_columns_each_and_no_third(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", few.x_test[0, ..., 0])
    network = small_network((28, 28, 1), 2)
    (lengths,) = network(few.x_test[:1] / np.float32(255))[0].numpy()
    weights = weights_of(network, class_names=["cat", "dog"])
    weights.metadata[KEY] = measure_appearance(Command().data.train).to_metadata()
    predict(Command("--predict=a.png").flags, weights)
    head, row = read_csv("samples/predictions.csv")
    assert head == ["file", "done", "class_1", "length_1", "class_2", "length_2"]
    order = np.argsort(-lengths)
    assert row[::2] == ["a.png", *(("cat", "dog")[k] for k in order)]
    np.testing.assert_allclose([float(cell) for cell in row[3::2]], lengths[order], atol=1e-5)


def test_a_file_whose_name_is_no_text_is_predicted_too(trained, few):
    name = b"in\xff.png"
    path = os.fsdecode(os.fsencode(trained) + b"/" + name)
    Image.fromarray(few.x_test[0, ..., 0]).save(path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as most terminals are
    with contextlib.redirect_stdout(out):
        assert main.main(["main.py", "--predict=*.png", DATA]) == 0
    out.flush()
    assert b"\n" + name + b" (unchanged): " in out.buffer.getvalue()
    assert name in (trained / "samples/predictions.csv").read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_terminal_lacks_are_escaped(trained, few, encoding):
    save(trained / "\N{SNOWMAN}é.png", few.x_test[0, ..., 0])
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(out):
        assert main.main(["main.py", "--predict=*.png", DATA]) == 0
    out.flush()
    name = "\N{SNOWMAN}é.png".encode(encoding, "backslashreplace")
    assert b"\n" + name + b" (unchanged): " in out.buffer.getvalue()


def test_an_image_that_no_reader_knows_is_an_error_of_the_user(tmp_path, few):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    pictures, failed = read(tmp_path / "a.png", x_train=few.x_train)
    assert pictures == [] and len(failed) == 1 and "a.png" in str(failed[0][1])
    with pytest.raises(UserError, match="matches no file"):
        matching_files(str(tmp_path / "b.png"))


def test_files_are_predicted_without_the_data_set(tmp_path, all_images):
    save(tmp_path / "a.png", enlarged(load_all("mnist", ROOT / "data").x_test[4, ..., 0]))
    words = ["--predict=a.png", "--pretrained", "--data_dir=nonexistent"]
    result = run(tmp_path, *words)
    assert (result.code, result.err) == (0, "")
    assert "taken off light paper of 252×84, scaled and centred): 4: 0.9" in result.out
    assert_refused(run(tmp_path, "--test", *words), 1, "nonexistent/mnist")


def test_the_pairs_that_come_with_the_program_are_read_as_they_are(tmp_path):
    files = sorted((ROOT / "assets/pairs").glob("*.png"))
    words = ["--predict=" + str(ROOT / "assets/pairs/*.png"), "--multi_MNIST", "--pretrained"]
    result = run(tmp_path, *words, "--data_dir=nonexistent")
    assert (result.code, result.err) == (0, "")
    found = re.findall(r"(\d)_and_(\d)\.png \(unchanged\): (\d) and (\d) ", result.out)
    assert len(found) == len(files) == 6
    assert sum({a, b} == {c, d} for a, b, c, d in found) > 3


def test_of_overlapping_digits_two_are_named_and_drawn(tmp_path, few, drawn, monkeypatch):
    network = varied_network((36, 36, 1))
    data = Command("--multi_MNIST").data.train
    description = {KEY: measure_appearance(data).to_metadata()}
    names = list("abcdefghij")
    folder = tmp_path / "multi_checkpoint/multi_mnist"
    save_checkpoint(folder, network, description, class_names=names, multi_MNIST=True)
    pair = compose_pairs(data)[3]
    save(tmp_path / "a.png", pair[..., 0])
    monkeypatch.setattr(datasets, "load_dataset", None)  # not needed
    result = run(tmp_path, "--predict=a.png", "--multi_MNIST", DATA)
    assert (result.code, result.err) == (0, "")
    lengths, capsules = (part.numpy() for part in network(pair[None] / np.float32(255)))
    longest = np.argsort(-lengths[0])[:3]
    scores = ", ".join(f"{names[k]}: {lengths[0, k]:.3f}" for k in longest)
    first, second, _ = (names[k] for k in longest)
    assert f"\na.png (unchanged): {first} and {second} ({scores})\n" in result.out
    head, row = read_csv(tmp_path / "samples/predictions.csv")
    assert head == [
        *("file", "done", "class_1", "length_1", "class_2", "length_2", "class_3", "length_3")
    ]
    assert row[2::2] == [names[k] for k in longest]
    _, (shown,), (reconstructions,), _ = drawn["samples/predictions.png"]
    np.testing.assert_array_equal(shown, pair)
    for place in (0, 1):
        expected = decode(network, capsules, longest[place : place + 1])
        np.testing.assert_allclose(reconstructions[place], expected[0], atol=1e-4)
