import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import model
import ops
import utils

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import affine
import cnn
import routing
import table1
import trial

# ---------------------------------------------------------------- the baseline CNNs


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(cnn.ARCHITECTURES, "affine", (((6, 5, True), (4, 4, False)), (9, 7), 0.5))


@pytest.mark.parametrize("architecture, side, digits, count", [
    ("mnist", 28, 1, 35_445_522),  # section 5: 35.4M
    ("multi", 36, 2, 24_563_978)])  # section 6.1: 24.56M
def test_the_baselines_have_exactly_the_parameters_of_the_paper(architecture, side, digits, count):
    assert cnn.CNN((side, side, 1), 10, architecture, digits).count_params() == count


def test_the_affine_baseline_has_about_the_parameters_of_the_capsnet_without_its_decoder():
    sizes = model.layer_sizes((affine.CANVAS, affine.CANVAS, 1), 10)[:3]
    count = cnn.CNN((affine.CANVAS, affine.CANVAS, 1), 10, "affine").count_params()
    assert abs(count / sum(n for *_, n in sizes) - 1) < 0.05


@pytest.mark.parametrize("conv", ["direct", "dft"])
def test_the_network_is_the_librarys_convolutions_pooling_and_layers(small, conv):
    net = cnn.CNN((12, 10, 1), 5, "affine", conv=conv)
    images = np.random.default_rng(0).random((3, 12, 10, 1), np.float32)
    x = images
    for layer, pooled in zip(net.convolutions, (True, False)):
        x = tf.nn.relu(tf.nn.conv2d(x, layer.kernel.value, 1, "SAME") + layer.bias.value)
        x = tf.nn.max_pool2d(x, 2, 2, "VALID") if pooled else x
    x = tf.reshape(x, (3, -1)).numpy()
    for layer in net.hidden[:-1]:
        x = np.maximum(x @ layer.kernel.numpy() + layer.bias.numpy(), 0)
    logits = x @ net.hidden[-1].kernel.numpy() + net.hidden[-1].bias.numpy()
    np.testing.assert_allclose(net.logits(images), logits, atol=1e-5)
    np.testing.assert_allclose(net.logits(images, net.spectra()), logits, atol=1e-5)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(net(images), expected, atol=1e-5)


def test_half_of_the_last_hidden_layer_is_dropped_in_training_only_anew_in_every_step(small):
    net = cnn.CNN((12, 12, 1), 5, "affine", seed=3)
    images = np.random.default_rng(0).random((400, 12, 12, 1), np.float32)
    last = net.hidden[-1]
    last.kernel.assign(np.eye(7, 5))  # so the logits show five units of the layer
    rest = net.logits(images).numpy()
    on = rest > 1e-3
    one, other, again = (net.logits(images, step=tf.constant(step)).numpy() for step in (4, 5, 4))
    np.testing.assert_array_equal(one, again)
    kept = one[on] != 0
    np.testing.assert_allclose(one[on][kept], 2 * rest[on][kept], rtol=1e-5)
    assert abs(kept.mean() - 0.5) < 0.06 and (kept != (other[on] != 0)).mean() > 0.3
    seeded = cnn.CNN((12, 12, 1), 5, "affine", seed=4)
    seeded.set_weights(net.get_weights())
    assert (seeded.logits(images, step=tf.constant(4)).numpy() != one).any()


def test_the_baseline_for_overlapping_digits_drops_nothing_out(monkeypatch):
    assert cnn.ARCHITECTURES["mnist"][2] == cnn.ARCHITECTURES["affine"][2] == 0.5
    monkeypatch.setitem(cnn.ARCHITECTURES, "multi", (
        ((3, 5, True),), (7,), cnn.ARCHITECTURES["multi"][2]))
    net = cnn.CNN((12, 12, 1), 5, "multi", 2)
    images = np.random.default_rng(0).random((9, 12, 12, 1), np.float32)
    np.testing.assert_array_equal(net.logits(images, step=tf.constant(3)), net.logits(images))


@pytest.mark.parametrize("digits", [1, 2])
def test_losses_and_predictions_agree_with_their_formulas(small, digits):
    net = cnn.CNN((12, 12, 1), 5, "affine", digits)
    dice = np.random.default_rng(1)
    images = dice.integers(0, 256, (6, digits, 12, 12, 1), np.uint8)
    labels = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2]], np.int32)[:, :digits]
    data = model.Data(images[:, 0], labels[:, 0])
    seen = net.examine(data, (images, np.zeros((6, digits, 2), int), labels, np.ones(6)))
    logits = net.logits(np.minimum(images.sum(axis=1) / 255, 1).astype(np.float32)).numpy()
    for n in range(6):
        if digits == 1:
            expected = -logits[n, labels[n, 0]] + math.log(sum(math.exp(z) for z in logits[n]))
        else:
            expected = sum(math.log(1 + math.exp(-z if j in labels[n] else z))
                           for j, z in enumerate(logits[n]))
        assert float(seen["margin"][n]) == pytest.approx(expected, rel=1e-4)
        best = set(np.argsort(-logits[n])[:digits])
        assert set(seen["predictions"][n].numpy()) == best
        assert bool(seen["correct"][n]) == (best == set(labels[n]))
    assert not seen["reconstruction"].numpy().any()


# ---------------------------------------------------------------- training and going on


def corners(n, seed=0):
    dice = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = dice.integers(0, 60, (n, 12, 12, 1), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[6 * (label // 2):][:6, 6 * (label % 2):][:, :6] += 180
    return model.Data(images, labels, class_names=("a", "b", "c"))


def test_a_baseline_learns_stops_when_it_is_good_enough_and_is_not_trained_twice(
        small, tmp_path, monkeypatch, capsys):
    train_data, test_data, held_out = corners(90), corners(30, 1), corners(30, 2)
    how = model.Training(batch_size=10, learning_rate=0.003)

    def go(enough=0.95, epochs=9):
        return trial.run(
            tmp_path / "a", lambda: cnn.CNN((12, 12, 1), 3, "affine", conv="dft"), train_data,
            test_data, how, epochs, until=(enough, held_out, held_out.evaluation_plan()))

    first, folder = go()
    assert 0.95 <= first["held_out_accuracy"] == found_by_hand(folder, held_out)
    assert first["accuracy"] > 0.9 and first["trained_epochs"] < 9 and first["images"] == 30
    assert "Held-out accuracy after 0.5 epochs" in capsys.readouterr().out
    assert round(30 * (1 - found_by_hand(folder, test_data))) == first["wrong"]
    less, other = go(0.2)
    assert less["trained_epochs"] == 0.5 < first["trained_epochs"] and other != folder
    best, epochs = go(1.1, 1)[0], []
    assert best["held_out_accuracy"] < 1.1 and best["trained_epochs"] == 1
    fit = model.Trainer.fit
    monkeypatch.setattr(model.Trainer, "fit", lambda self, part, **more: (
        fit(self, part, **more) and epochs.append(part)))
    assert go(1.1, 2)[0]["trained_epochs"] == 2 and epochs == [1.5, 2]  # it went on
    monkeypatch.setattr(model.Trainer, "fit", None)
    assert go() == (first, folder) and go(0.2) == (less, other)
    assert go(1.1, 2)[0]["trained_epochs"] == go(1.1, 1)[0]["trained_epochs"] == 2


def found_by_hand(folder, data):
    network = cnn.CNN((12, 12, 1), 3, "affine")
    model.load_weights(network, folder / "checkpoint", print)
    found = network(data.images / np.float32(255)).numpy().argmax(axis=1)
    return float((found == data.labels).mean())


def test_trainings_of_other_lengths_or_networks_do_not_meet_and_a_stopped_one_goes_on(
        small, tmp_path, monkeypatch):
    train_data, test_data, fit = corners(30), corners(9, 1), model.Trainer.fit

    def go(epochs, layers=2):
        monkeypatch.setitem(cnn.ARCHITECTURES, "affine", (((4, 4, False),) * layers, (7,), 0.5))
        return trial.run(tmp_path / "a", lambda: cnn.CNN((12, 12, 1), 3, "affine"), train_data,
                         test_data, model.Training(batch_size=10), epochs)

    def fit_and_stop(trainer, *arguments, **more):
        fit(trainer, 1, **more)
        raise model.Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(model.Trainer, "fit", fit_and_stop)
        with pytest.raises(model.Interrupted):
            go(2)
    longer, folder = go(2)
    assert model.saved_steps(folder / "checkpoint")[0] == 6 and longer["trained_epochs"] == 2
    shorter, other = go(1)
    assert model.saved_steps(other / "checkpoint")[0] == 3 and shorter["trained_epochs"] == 1

    def fail_with(text):
        raise utils.UserError(text)

    monkeypatch.setattr(model.Trainer, "fit", lambda *_, **__: fail_with(
        "the loss is not finite at step 3; try a lower --learning_rate"))
    assert go(2)[1] == folder
    with pytest.raises(utils.UserError, match="not finite at step 3; the same command") as error:
        go(2, layers=1)
    monkeypatch.setattr(model.Trainer, "fit", lambda *_, **__: fail_with(
        "another training runs in x; wait for it, or give other folders (--checkpoint_dir)"))
    with pytest.raises(utils.UserError, match="^another training runs in x; wait for it$"):
        go(2, layers=1)
    assert "--" not in str(error.value) and not any(
        str(known) in str(error.value) for known in (folder, other))


# ---------------------------------------------------------------- table 1


def outcome(seed, wrong):
    return {"error_percent": wrong / 100, "wrong": wrong, "training": {"seed": seed}, "epochs": 3,
            "training_seconds": 600.0, "parameters": 35445522}


def test_the_table_has_means_deviations_and_the_papers_column(tmp_path):
    results = {"cnn": [outcome(0, 50)], "3-yes": [outcome(0, 40), outcome(1, 50), outcome(2, 45)]}
    _, _, baseline, capsnet = table1.table(results, "MNIST")
    assert baseline == ("| Baseline CNN | – | – | 35,445,522 | 0.50 | 50 | 0 | 3 | 10 | 0.39 |")
    assert capsnet == ("| CapsNet | 3 | yes | 35,445,522 | 0.45 ± 0.050 | 40, 50, 45 | 0, 1, 2 | 3 "
                       "| 10, 10, 10 | 0.25 ± 0.005 |")
    assert table1.table(results, "multi_MNIST")[2].endswith("| 8.1 |")
    table1.draw(tmp_path / "a.png", results, "MNIST")
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize("row, overlap, network, weight", [
    ("cnn", False, "mnist", 0.0), ("cnn", True, "multi", 0.0), ("1-no", False, 1, 0.0),
    ("1-yes", False, 1, 0.0005), ("3-no", False, 3, 0.0), ("3-yes", False, 3, 0.0005),
    ("1-yes", True, 1, 0.005), ("3-yes", True, 3, 0.005)])
def test_a_row_trains_the_network_that_it_names_on_the_papers_data(
        row, overlap, network, weight, tmp_path, monkeypatch):
    asked = []

    def run(*arguments):
        asked.append(arguments)
        raise utils.UserError("enough")

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(model, "CapsNet", lambda shape, classes, routing_iterations, conv: (
        shape, routing_iterations))
    monkeypatch.setattr(cnn, "CNN", lambda shape, classes, architecture, digits, conv, seed: (
        shape, architecture) if (digits, seed) == (1 + overlap, 5) else None)
    dataset = "multi_MNIST" if overlap else "MNIST"
    assert table1.main([f"--dataset={dataset}", f"--rows={row}", "--seeds=5", "--epochs=3",
                        f"--output={tmp_path}"]) == 1
    folder, make, train_data, test_data, how, epochs = asked[0]
    side = 36 if overlap else 28
    assert make() == ((side, side, 1), network) and epochs == 3
    assert (how.seed, how.reconstruction_weight) == (5, weight)
    assert (how.batch_size, how.averaging, how.decay_steps) == (
        (32, 0.998, 900) if overlap else (64, 0.99, 300))
    assert (len(train_data.labels), len(test_data.labels)) == (60000, 10000)
    assert table1.main([f"--dataset={dataset}", f"--rows={row}", "--seeds=5", "--epochs=3",
                        "--train_size=20000", f"--output={tmp_path}"]) == 1
    assert (len(asked[1][2].labels), asked[1][4].decay_steps) == (20000, how.decay_steps // 3)
    assert train_data.max_shift == (4 if overlap else 2) and train_data.overlap == overlap
    assert test_data.canvas_shape() == (side, side, 1) and test_data.overlap == overlap


@pytest.mark.parametrize("program, words", [
    (table1, "--rows=2-yes"), (table1, "--rows=cnn,cnn"), (table1, "--seeds=a"),
    (table1, "--seeds=1,1"), (table1, "--seeds=5000000000"), (table1, "--epochs=0"),
    (table1, "--dataset=x"), (affine, "--networks=resnet"), (affine, "--accuracy=0.99"),
    (affine, "--accuracy=nan"), (affine, "--accuracy=x"), (routing, "--iterations=0"),
    (routing, "--iterations=101")])
def test_wrong_words_are_usage_errors(program, words, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert f": argument {words.split('=')[0]}: " in said and said.endswith("; see --help\n")


def test_missing_data_are_said_in_one_line(tmp_path, capsys):
    for program in (table1, affine, routing):
        words = [f"--data_dir={tmp_path / 'none'}", f"--output={tmp_path}"]
        assert program.main(words) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "python download.py mnist" in said


# ---------------------------------------------------------------- affine transformations


def test_a_transformation_at_rest_moves_the_ink_and_keeps_every_pixel():
    digit = utils.load_dataset("mnist", ROOT / "data").x_test[0, ..., 0]
    ink = digit[np.ix_(digit.any(1), digit.any(0))]
    height, width = ink.shape
    for place, (top, left) in {(0.0, 0.0): (0, 0), (0.999, 0.999): (40 - height, 40 - width),
                               (1.0, 0.0): (40 - height, 0)}.items():
        moved = affine.transform(digit, affine.transform_matrix(0, 0, 1, 1), place)
        np.testing.assert_array_equal(moved[top:top + height, left:left + width], ink)
        assert moved.sum(dtype=int) == digit.sum(dtype=int)


def test_turning_by_a_right_angle_is_that_of_numpy_and_scaling_doubles_the_sides():
    digit = np.zeros((28, 28), np.uint8)
    digit[8:20, 10:14], digit[8:10, 10:20] = 255, 200
    turned = affine.transform(digit, affine.transform_matrix(90, 0, 1, 1), (0, 0))
    ink = np.rot90(digit, -1)  # clockwise
    ink = ink[np.ix_(ink.any(1), ink.any(0))]
    np.testing.assert_array_equal(turned[:ink.shape[0], :ink.shape[1]], ink)
    block = np.zeros((28, 28), np.uint8)
    block[10:18, 11:17] = 255
    large = affine.transform(block, affine.transform_matrix(0, 0, 2, 1), (0, 0)) > 127
    assert (large.any(1).sum(), large.any(0).sum()) == (16, 6)
    sheared = affine.transform(block, affine.transform_matrix(0, 0.5, 1, 1), (0, 0)) > 127
    starts = [np.flatnonzero(row)[0] for row in sheared if row.any()]
    assert starts == sorted(starts) and 3 <= starts[-1] - starts[0] <= 4  # half of 8 rows


@pytest.mark.parametrize("rotation, shear, y, x", [(0, 0, 1, 1), (30, 0.2, 0.8, 1.2), (-90, 0, 2, 1)])
def test_the_matrix_is_a_rotation_of_a_shear_of_a_scaling(rotation, shear, y, x):
    matrix = affine.transform_matrix(rotation, shear, y, x)
    a = math.radians(rotation)
    for point in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        px, py = point[0] * x, point[1] * y
        px = px + shear * py
        expected = (px * math.cos(a) - py * math.sin(a), px * math.sin(a) + py * math.cos(a))
        np.testing.assert_allclose(matrix @ point, expected, atol=1e-12)


def test_the_affine_digits_are_fixed_differ_and_lie_everywhere_on_the_canvas():
    images = utils.load_dataset("mnist", ROOT / "data").x_test[:300]
    made = affine.affine_test_images(images)
    np.testing.assert_array_equal(made, affine.affine_test_images(images))
    assert (made != affine.affine_test_images(images, seed=1)).any()
    assert made.shape == (300, 40, 40, 1) and made.dtype == np.uint8
    assert made.any(axis=(0, 2, 3)).all() and made.any(axis=(0, 1, 3)).all()  # every row, column
    # Shear keeps the ink, and the two scalings change it by 0.64 to 1.44.
    ratio = made.sum(axis=(1, 2, 3), dtype=float) / images.sum(axis=(1, 2, 3), dtype=float)
    assert 0.6 < ratio.min() < 0.75 and 1.3 < ratio.max() < 1.5 and abs(ratio.mean() - 1) < 0.05


def test_digits_that_are_only_moved_lie_where_the_deformed_ones_do():
    images = utils.load_dataset("mnist", ROOT / "data").x_test[:200]
    moved = affine.affine_test_images(images, deformed=False)
    np.testing.assert_array_equal(
        moved.sum(axis=(1, 2, 3), dtype=int), images.sum(axis=(1, 2, 3), dtype=int))

    def middles(canvas):
        weights = canvas[..., 0] / canvas.sum(axis=(1, 2, 3), dtype=float)[:, None, None]
        return np.stack([(weights.sum(axis=2) @ np.arange(40)), weights.sum(axis=1) @ np.arange(40)])

    assert np.abs(middles(moved) - middles(affine.affine_test_images(images))).max() < 5


def test_a_translation_moves_the_ink_from_the_middle_towards_the_four_corners_in_turn():
    image = np.zeros((28, 28, 1), np.uint8)
    image[10:20, 12:16] = 255  # 10 rows and 4 columns of ink: 30 and 36 of the canvas are free
    images = np.stack([image] * 5)
    for value, tops, lefts in ((0.0, (15, 15), (18, 18)), (0.4, (9, 21), (11, 25)),
                               (1.0, (0, 30), (0, 36))):
        found = affine.swept_images(images, "translation", value)
        places = [np.argwhere(canvas)[0, :2] for canvas in found]
        corners = [(tops[y], lefts[x]) for y in (0, 1) for x in (0, 1)]
        assert np.abs(np.array(places) - [*corners, corners[0]]).max() <= 1
        assert (found.sum(axis=(1, 2, 3)) == image.sum()).all()


def test_placed_digits_are_the_same_in_every_call_and_anywhere_within_the_margin():
    data = model.Data(np.zeros((500, 28, 28, 1), np.uint8), np.zeros(500, int), 6, 6)
    plan = affine.placed(data)
    np.testing.assert_array_equal(plan.shift, affine.placed(data).shift)
    assert (plan.shift.min(), plan.shift.max()) == (-6, 6)
    assert data.canvas_shape() == (40, 40, 1)


def test_a_network_of_the_affine_experiment_is_tested_once_and_its_table_printed_again(
        small, tmp_path, monkeypatch, capsys):
    mnist = utils.load_dataset("mnist", ROOT / "data")
    monkeypatch.setattr(utils, "load_dataset", lambda *_: mnist._replace(
        x_train=mnist.x_train[:60], y_train=mnist.y_train[:60], x_test=mnist.x_test[:20],
        y_test=mnist.y_test[:20]))
    words = ["--networks=cnn", "--epochs=1", f"--output={tmp_path}"]
    assert affine.main(words) == 0
    first = capsys.readouterr().out
    outcome = json.loads((tmp_path / "affine.json").read_text())["cnn"]
    right = 100 * outcome["affine_right"] / 20
    reached = 100 * outcome["held_out_accuracy"]
    assert f"| CNN | {outcome['parameters']:,} | 1 | {reached:.2f} |" in first
    anywhere = 100 * outcome["places_right"] / 20
    assert f"| {anywhere:.2f} | {right:.2f} (" in first and "CNN did not reach 99.23% in 1 epoch; to go on" in first
    assert {name: len(values) for name, values in outcome["sweeps"].items()} == {
        "rotation": 4, "shear": 4, "scale": 4, "translation": 4}
    at_rest = {outcome["sweeps"][name][place] for name, place in (
        ("rotation", 0), ("shear", 0), ("scale", 2), ("translation", 0))}
    assert at_rest == {outcome["at_rest"]} and first.count(" 0\n") == 1  # the same images, once
    assert (tmp_path / "affine.png").stat().st_size > 5000
    (kept,) = tmp_path.glob("cnn_*/tested.json")
    tested = json.loads(kept.read_text())
    tested["sweeps"]["scale"] = tested["sweeps"]["scale"][:3]  # as if stopped there
    kept.write_text(json.dumps(tested))
    swept, swept_images = [], affine.swept_images
    monkeypatch.setattr(affine, "swept_images", lambda images, factor, value: swept.append(
        (factor, value)) or swept_images(images, factor, value))
    assert affine.main(words) == 0 and capsys.readouterr().out.split("\n|")[1:] == first.split(
        "\n|")[1:]
    assert swept == [("scale", 1.2)]


@pytest.mark.parametrize("right, n, low, high", [  # by hand from Wilson's formula
    (50, 100, 40.383, 59.617), (0, 10, 0.0, 27.753), (7900, 10000, 78.190, 79.787)])
def test_the_interval_is_wilsons(right, n, low, high):
    assert affine.interval(right, n) == pytest.approx((low, high), abs=2e-3)


# ---------------------------------------------------------------- the README


def test_the_tables_in_the_readme_are_made_from_what_the_experiments_left():
    readme, folder = (ROOT / "README.md").read_text(), ROOT / "results/experiments"
    table1_mnist, found = (json.loads((folder / f"{name}.json").read_text())
                           for name in ("table1_MNIST", "affine"))
    for lines in table1.table(table1_mnist, "MNIST"), affine.table(found):
        assert "\n" + "\n".join(lines) + "\n" in readme
    routed = json.loads((folder / "routing.json").read_text())
    for number in (1, 2, 3, 5, 10):
        change, entropy = (routed[name][number - 1] for name in ("changes", "entropies_bits"))
        assert f"| {number} | {change:.5f} | {entropy:.4f} |" in readme


# ---------------------------------------------------------------- routing, watched


def test_watched_routing_is_the_routing_of_the_network_and_of_a_slow_loop():
    u_hat = np.random.default_rng(0).normal(0, 0.5, (3, 4, 5, 6)).astype(np.float32)
    for iterations in (1, 2, 4):
        changes, entropies, v = routing.measure(tf.constant(u_hat), iterations)
        np.testing.assert_allclose(v, ops.routing(tf.constant(u_hat), iterations), atol=1e-5)
        b = np.zeros((3, 4, 5))
        for r in range(iterations):
            c = np.exp(b) / np.exp(b).sum(axis=1, keepdims=True)
            entropy = np.mean([-sum(p * math.log2(p) for p in c[n, :, i])
                               for n in range(3) for i in range(5)])
            change = np.zeros_like(b)
            for n, j in np.ndindex(3, 4):
                s = sum(c[n, j, i] * u_hat[n, j, i] for i in range(5))
                squared = s @ s
                out = squared / (1 + squared) * s / math.sqrt(squared)
                for i in range(5):
                    change[n, j, i] = u_hat[n, j, i] @ out
            b += change
            assert changes[r] == pytest.approx(np.abs(change).mean(), rel=1e-4)
            assert entropies[r] == pytest.approx(entropy, rel=1e-4)


def test_weights_of_another_data_set_are_not_watched_on_mnist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "load_weights", lambda *_: {"training": {"dataset": "kmnist"}})
    assert routing.main([f"--checkpoint={tmp_path}", f"--output={tmp_path}"]) == 1
    assert "was trained on kmnist, expected a network of MNIST" in capsys.readouterr().err


def test_routing_of_the_trained_network_is_measured_and_drawn(tmp_path, capsys):
    words = ["--images=20", "--iterations=3", f"--output={tmp_path}"]
    assert routing.main(words) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "routing.json").read_text())
    assert f"| 3 | {found['changes'][2]:.5f} | {found['entropies_bits'][2]:.4f} |" in said
    assert found["entropies_bits"][0] == pytest.approx(math.log2(10), abs=1e-5)
    assert found["images"] == 20 and (tmp_path / "routing.png").stat().st_size > 5000
