from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from story import QUICK, Command, compose_slowly, decode, varied_network, weights_of

import commands.pictures
from commands.pictures import reconstruction_test, tweak_test
from commands.reports import outputs_of, show_picture
from inputs.pipeline import Examples

pytest_plugins = ["story_fixtures"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shown(monkeypatch):
    """What was shown in TensorBoard."""
    given = []
    monkeypatch.setattr(commands.pictures, "show_picture", lambda *args: given.append(args))
    return given


def draw(mode, *words, network=None):
    """Run a mode with a network, by default one of single digits."""
    command = Command(*QUICK, f"--{mode.__name__}", *words)
    mode(command.flags, command.data, weights_of(network or varied_network()))


def results(few, overlap, count):
    """Compute what the network sees in the first test examples, and what it decodes."""
    shape = (36, 36, 1) if overlap else (28, 28, 1)
    plan = (
        Examples(None, few.y_test, max_shift=4, overlap=overlap)
        .evaluation_plan()
        .take(slice(count))
    )
    network = varied_network(shape)
    canvas = compose_slowly(few.x_test, plan, 4 if overlap else 0)
    lengths, capsules = (part.numpy() for part in network(canvas))
    longest = np.argsort(-lengths)[:, : plan.index.shape[1]]
    return network, canvas, capsules, few.y_test[plan.index], longest


def overlay(network, capsules, classes):
    """Decode each capsule alone; return all digits, and their sum with at most 1 in a pixel."""
    digits = [decode(network, capsules, column) for column in classes.T]
    return np.stack(digits, axis=1), np.minimum(sum(digits), 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_reconstructions_come_from_the_labels_and_from_the_longest_capsules(
    few, drawn, shown, overlap, capsys
):
    network, canvas, capsules, labels, longest = results(few, overlap, 64)
    words = ["--multi_MNIST"] if overlap else []
    draw(reconstruction_test, *words, "--sample_dir=out", network=network)
    with_label, with_label_grid = overlay(network, capsules, labels)
    without_label, without_label_grid = overlay(network, capsules, longest)
    assert np.abs(with_label_grid - without_label_grid).max() > 0.1

    (images,) = drawn["out/samples_arrange.png"]
    np.testing.assert_allclose(images, canvas, atol=1e-6)
    (images,) = drawn["out/recon_samples_with_label_arrange.png"]
    np.testing.assert_allclose(images, with_label_grid, atol=1e-4)
    (images,) = drawn["out/recon_samples_without_label_arrange.png"]
    np.testing.assert_allclose(images, without_label_grid, atol=1e-4)

    outputs, shown_labels, names = drawn["out/reconstruction.png"]
    np.testing.assert_allclose(outputs.canvas, canvas, atol=1e-6)
    np.testing.assert_allclose(outputs.with_label, with_label, atol=1e-4)
    np.testing.assert_allclose(outputs.without_label, without_label, atol=1e-4)
    np.testing.assert_array_equal(shown_labels, labels)
    np.testing.assert_array_equal(outputs.predictions, longest)
    assert names == few.class_names and len(drawn) == 4

    ((logs, step, tag, page),) = shown
    assert (logs, step) == (Path("logs/multi_mnist" if overlap else "logs/mnist"), 15)
    assert tag == "reconstructions"
    np.testing.assert_array_equal(page, np.asarray(Image.open("out/reconstruction.png")))
    for name in drawn:
        assert Path(name).exists()
    assert capsys.readouterr().out == (
        "Wrote out/samples_arrange.png, out/recon_samples_with_label_arrange.png, "
        "out/recon_samples_without_label_arrange.png, out/reconstruction.png\n"
    )


def test_the_grid_of_samples_has_the_first_64_test_images_in_order(few, drawn):
    draw(reconstruction_test)
    pixels = np.asarray(Image.open("samples/samples_arrange.png"))
    assert pixels.shape[:2] == (3 * (8 * 29 - 1), 3 * (8 * 29 - 1))
    pixels = pixels if pixels.ndim == 2 else pixels[..., 0]
    for number in range(64):
        y, x = 87 * (number // 8), 87 * (number % 8)
        image = pixels[y : y + 84 : 3, x : x + 84 : 3]
        np.testing.assert_array_equal(image, few.x_test[number, :, :, 0])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_tweak_adds_to_one_dimension_of_the_longest_capsule(few, drawn, shown, overlap, capsys):
    network, canvas, capsules, _, longest = results(few, overlap, 3)
    words = ["--multi_MNIST"] if overlap else []
    draw(tweak_test, *words, "--tweak_num=3", "--tweak_dir=out", network=network)
    deltas = [-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25]
    names = [few.class_names[number] for number in longest[:, 0]]
    expected = np.zeros((4, 3, 11, *canvas.shape[1:]))
    for dim in range(4):
        for step, delta in enumerate(deltas):
            moved = capsules.copy()
            for digit, number in enumerate(longest[:, 0]):
                moved[digit, number, dim] += delta
            expected[dim, :, step] = decode(network, moved, longest[:, 0])
    assert np.ptp(expected, axis=2).max() > 0.01

    for dim in range(4):
        images, steps, dimension, rows = drawn[f"out/tweak_result_{dim}.png"]
        np.testing.assert_allclose(images, expected[dim], atol=1e-4)
        np.testing.assert_allclose(steps, deltas, atol=1e-12)
        assert (dimension, rows) == (dim, names)
    images, steps, name = drawn["out/overview.png"]
    np.testing.assert_allclose(images, expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(steps, deltas, atol=1e-12)
    assert name == names[0]
    images, steps, rows = drawn["out/sweep.gif"]
    np.testing.assert_allclose(images, expected, atol=1e-4)
    np.testing.assert_allclose(steps, deltas, atol=1e-12)
    assert rows == names and len(drawn) == 6

    ((logs, step, tag, page),) = shown
    assert (logs, step) == (Path("logs/multi_mnist" if overlap else "logs/mnist"), 15)
    assert tag == "tweaks"
    np.testing.assert_array_equal(page, np.asarray(Image.open("out/overview.png")))
    assert capsys.readouterr().out == (
        "Wrote out/tweak_result_0.png to _3.png, out/overview.png, out/sweep.gif\n"
    )


def test_as_many_digits_are_tweaked_as_the_flag_says(few, drawn):
    for words, count in [([], 5), (["--tweak_num=2"], 2)]:
        draw(tweak_test, *words)
        assert len(drawn["tweak/tweak_result_0.png"][0]) == count


def test_outputs_of_a_plan_are_arrays_in_its_order(few):
    chosen = [150, 3, 77]
    data = Command("--test").data.test
    outputs, labels = outputs_of(varied_network(), data, data.evaluation_plan().take(chosen))
    assert all(isinstance(value, np.ndarray) for value in outputs)
    np.testing.assert_allclose(outputs.canvas, few.x_test[chosen] / np.float32(255), atol=1e-6)
    assert labels.tolist() == [[few.y_test[n]] for n in chosen]


def test_a_picture_for_tensorboard_replaces_that_of_the_command_before(tmp_path):
    for grey in (50, 200):
        picture = np.full((5, 7, 3), grey, np.uint8)
        show_picture(tmp_path, 15, "reconstructions", picture)
    show_picture(tmp_path, 15, "tweaks", np.zeros((2, 2, 3), np.uint8))
    paths = sorted((tmp_path / "test").iterdir(), key=lambda path: path.suffix)
    assert [path.suffix for path in paths] == [".reconstructions", ".tweaks"]
    records = tf.data.TFRecordDataset(str(paths[0])).as_numpy_iterator()
    events = [tf.compat.v1.Event.FromString(record) for record in records]
    (event,) = (event for event in events if event.summary.value)
    (value,) = event.summary.value
    assert (event.step, value.tag) == (15, "reconstructions")
    shown = tf.io.decode_png(value.tensor.string_val[2]).numpy()
    np.testing.assert_array_equal(shown, np.full((5, 7, 3), 200))
