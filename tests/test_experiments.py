"""The experiments: their networks, training runs, tests, tables and pictures."""

import hashlib
import json
import math
from pathlib import Path

import affine
import keras
import numpy as np
import pytest
import routing
import table1
import tensorflow as tf
from experiment_lib import trial

import model
import ops
from capsnet_core import errors
from capsnet_core.config import TrainingConfig
from capsnet_core.errors import Interrupted
from capsnet_core.networks import CNN_LAYERS, Layers
from figures import files, plots
from inputs import datasets
from inputs.pipeline import Examples
from runtime import command_line
from training.checkpoints import load_weights, saved_steps
from training.trainer import Trainer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "experiments"
DOWNLOAD = ROOT / "download.py"
FUNCTIONS = {table1: table1.train_all, affine: affine.compare, routing: routing.watch}


def main(program, *words):
    """Run a script in this process and return its exit code."""
    name, function = f"a/{program.__name__}.py", getattr(program, FUNCTIONS[program].__name__)
    advice = getattr(program, "ADVICE", None)
    return command_line.run_script([name, *words], program.__doc__, program.FLAGS, function, advice)


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="module")
def mnist():
    return datasets.load_dataset("mnist", ROOT / "data")


@pytest.fixture
def small(monkeypatch):
    """A small CNN under the name of one of the paper's, and nothing is compiled by XLA."""
    monkeypatch.setitem(CNN_LAYERS, "affine", Layers(((6, 5, True), (4, 4, False)), (9, 7), 0.5))
    function = tf.function
    monkeypatch.setattr(tf, "function", lambda *a, jit_compile=None, **k: function(*a, **k))


def make_small():
    return model.CNN((12, 12, 1), 3, "affine")


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, and their paths."""
    figures_saved = []
    monkeypatch.setattr(plots, "render", lambda figure: figure)
    monkeypatch.setattr(files, "write_png", lambda *args: figures_saved.append(args))
    return figures_saved


def lines_of(panel):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in panel.get_lines()
    }


# --- Training and resuming ------------------------------------------------------------------------


def corners(n, seed=0):
    """Return Examples of n noisy images whose bright corner is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 60, (n, 12, 12, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[6 * (label // 2) :][:6, 6 * (label % 2) :][:, :6] += 180
    return Examples(images, labels, class_names=("a", "b", "c"))


def accuracy_by_hand(folder, data):
    network = make_small()
    load_weights(network, folder / "checkpoint", print)
    predictions = network(data.images / np.float32(255)).numpy().argmax(axis=1)
    return float((predictions == data.labels).mean())


def test_a_baseline_learns_stops_at_its_goal_and_is_not_trained_twice(
    small, tmp_path, monkeypatch, capsys
):
    train_data, test_data, held_out = corners(90), corners(30, 1), corners(30, 2)
    training = TrainingConfig(batch_size=10, learning_rate=0.003)

    def run(accuracy=0.95, epochs=9):
        goal, folder = trial.Goal(accuracy, held_out, held_out.evaluation_plan()), tmp_path / "a"
        return trial.run(folder, make_small, train_data, test_data, training, epochs, goal=goal)

    first = run()
    (folder,) = tmp_path.iterdir()
    said = capsys.readouterr().out
    assert 0.95 <= first["held_out_accuracy"] == accuracy_by_hand(folder, held_out)
    assert first["trained_epochs"] < 9 and first["images"] == 30
    looks = [float(line.split()[-1][:-1]) for line in said.splitlines() if "Held-out" in line]
    assert len(looks) == 2 * first["trained_epochs"]  # twice an epoch, and none after the goal
    assert max(looks[:-1]) < 95 <= looks[-1]
    assert first["accuracy"] > 0.9
    assert 30 * (1 - accuracy_by_hand(folder, test_data)) == pytest.approx(first["wrong"])
    low = run(0.2)
    assert low["trained_epochs"] == 0.5 and len(list(tmp_path.iterdir())) == 2
    missed, epochs = run(1.1, 1), []
    assert missed["held_out_accuracy"] < 1.1 and missed["trained_epochs"] == 1
    fit = Trainer.fit

    def fit_and_record(self, part, *more):
        if fit(self, part, *more):
            epochs.append(part)

    monkeypatch.setattr(Trainer, "fit", fit_and_record)
    assert run(1.1, 2)["trained_epochs"] == 2
    assert epochs == [1.5, 2]  # resumed after the first epoch
    for result in tmp_path.glob("a_*/result.json"):  # as if interrupted before it was written
        if json.loads(result.read_text())["until"][0] == 1.1:
            result.unlink()
    assert run(1.1, 1)["trained_epochs"] == 2 and epochs == [1.5, 2]
    monkeypatch.setattr(Trainer, "fit", None)
    assert run() == first and run(0.2) == low
    assert run(1.1, 2)["trained_epochs"] == run(1.1, 1)["trained_epochs"] == 2


def test_a_share_reaches_the_percentage_that_it_is():
    assert trial.reaches(9923 / 10000, 99.23 / 100)
    assert not trial.reaches(9922 / 10000, 99.23 / 100)


def run_tiny(folder, epochs):
    training = TrainingConfig(batch_size=10)
    return trial.run(folder, make_small, corners(30), corners(9, 1), training, epochs)


def test_runs_of_other_lengths_do_not_share_a_folder_and_a_stopped_one_resumes(
    small, tmp_path, monkeypatch
):
    fit = Trainer.fit

    def fit_and_stop(trainer, *arguments, **more):
        fit(trainer, 1, 500)
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit_and_stop)
        with pytest.raises(Interrupted):
            run_tiny(tmp_path / "a", 2)
    first_steps = []

    def record(trainer, *arguments, **more):
        trainer.callbacks[0].on_train_batch_end = lambda at: first_steps.append(at.step)
        return fit(trainer, *arguments, **more)

    monkeypatch.setattr(Trainer, "fit", record)
    longer = run_tiny(tmp_path / "a", 2)
    (folder,) = tmp_path.iterdir()
    assert first_steps == [4, 5, 6]
    assert saved_steps(folder / "checkpoint")[0] == 6 and longer["trained_epochs"] == 2
    shorter = run_tiny(tmp_path / "a", 1)
    (other,) = set(tmp_path.iterdir()) - {folder}
    assert saved_steps(other / "checkpoint")[0] == 3 and shorter["trained_epochs"] == 1


@pytest.mark.parametrize(
    "error", [errors.NotFinite("the loss is", 3), errors.FolderTaken("x", "y")]
)
def test_an_error_that_removing_the_folder_cures_names_the_folder(
    error, small, tmp_path, monkeypatch
):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(errors.UserError) as raised:
        run_tiny(tmp_path / "a", 1)
    message = str(raised.value)
    assert message.startswith(str(error))
    assert f"{tmp_path}/a_" in message and "start over" in message and "--" not in message


def test_a_folder_in_use_is_no_reason_to_remove_it(small, tmp_path, monkeypatch):
    def fail(*arguments, **more):
        raise errors.FolderInUse("x")

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(errors.FolderInUse, match="^another run is training in x$"):
        run_tiny(tmp_path / "a", 1)


def test_the_first_weights_follow_from_the_seed(tmp_path, monkeypatch, small):
    weights = []

    def make():
        network = make_small()
        weights.append(np.concatenate([array.ravel() for array in network.get_weights()]))
        return network

    def fail(*arguments, **more):
        raise errors.UserError("enough")

    monkeypatch.setattr(Trainer, "fit", fail)
    for seed in (1, 1, 2):
        with pytest.raises(errors.UserError, match="enough"):
            trial.run(tmp_path / "a", make, corners(9), corners(9), TrainingConfig(seed), 1)
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_a_change_of_any_data_gives_another_fingerprint():
    data, plan = corners(9), corners(9).evaluation_plan()
    image, labels = data.images.copy(), data.labels.copy()
    image[3, 4, 5], labels[0] = 255, 1
    shifted = plan._replace(shift=plan.shift + 1)
    variants = [
        (data, data, None),
        (data, corners(8), None),
        (data, data, plan),
        (data, data, shifted),
        (data._replace(images=image), data, None),
        (data._replace(labels=labels), data, None),
        (data._replace(padding=1), data, None),
        (data._replace(max_shift=1), data, None),
        (data._replace(overlap=True), data, None),
    ]
    fingerprints = [trial.digest_data(*variant) for variant in variants]
    assert len(set(fingerprints)) == len(variants)
    assert trial.digest_data(corners(9), corners(9), None) == fingerprints[0]


def test_a_decoder_without_a_part_in_the_loss_is_not_counted(small):
    capsnet = model.CapsNet((20, 20, 1), 3, 6, 2, 4, 4, decoder_units=(8,))
    decoder = (3 * 4 + 1) * 8 + (8 + 1) * 400
    with_decoder = trial.count_trained(capsnet, TrainingConfig())
    assert with_decoder == sum(math.prod(v.shape) for v in capsnet.variables)
    silent = TrainingConfig(reconstruction_weight=0.0)
    assert trial.count_trained(capsnet, silent) == with_decoder - decoder
    baseline = make_small()
    assert trial.count_trained(baseline, silent) == baseline.count_params()


# --- Table 1 --------------------------------------------------------------------------------------


def outcome(seed, wrong, minutes=10):
    return {
        "error_percent": wrong / 100,
        "wrong": wrong,
        "training": {"seed": seed},
        "epochs": 3,
        "training_seconds": 60.0 * minutes,
        "parameters": 35445522,
        "machine": "a machine",
        "versions": {"tensorflow": "2.21"},
        "images": 10000,
    }


RESULTS_OF_TABLE1 = {
    "cnn": [outcome(0, 50)],
    "1-no": [outcome(4, 70)],
    "3-yes": [outcome(0, 40), outcome(1, 50, 11), outcome(2, 48)],  # deviation 0.0529 by hand
}


def test_two_outcomes_have_a_deviation_and_one_has_none():
    mean, deviation = table1.mean_error([outcome(0, 40), outcome(1, 50)])
    assert mean == pytest.approx(0.45) and deviation == pytest.approx(0.1 / 2**0.5)
    assert table1.mean_error([outcome(0, 40)]) == (0.4, None)


def test_the_table_has_means_deviations_and_the_papers_column():
    _, _, baseline, single, capsnet = table1.table(RESULTS_OF_TABLE1, "MNIST")
    assert baseline == "| Baseline CNN | – | – | 35,445,522 | 0.50 | 50 | 0 | 3 | 10 | 0.39 |"
    assert single == "| CapsNet | 1 | no | 35,445,522 | 0.70 | 70 | 4 | 3 | 10 | 0.34 ± 0.032 |"
    assert capsnet == (
        "| CapsNet | 3 | yes | 35,445,522 | 0.46 ± 0.053 | 40, 50, 48 | 0, 1, 2 | 3 "
        "| 10, 11, 10 | 0.25 ± 0.005 |"
    )
    header, _, baseline, single, capsnet = table1.table(RESULTS_OF_TABLE1, "multi_MNIST")
    assert header.endswith("| the paper, multi_MNIST, % |")
    assert [row.split(" | ")[-1] for row in (baseline, single, capsnet)] == [
        "8.1 |",
        "– |",
        "5.2 |",
    ]


@pytest.mark.parametrize(
    "row, overlap, network, weight",
    [
        ("cnn", False, "mnist", 0.0),
        ("cnn", True, "multi", 0.0),
        ("1-no", False, 1, 0.0),
        ("1-yes", False, 1, 0.0005),
        ("3-no", False, 3, 0.0),
        ("3-yes", False, 3, 0.0005),
        ("1-yes", True, 1, 0.005),
        ("3-yes", True, 3, 0.005),
    ],
)
def test_a_row_trains_the_network_that_it_names_on_the_papers_data(
    row, overlap, network, weight, mnist, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: mnist)

    def run(*arguments):
        calls.append(arguments)
        return outcome(5, 1)

    def make_capsnet(shape, classes, routing_iterations, conv):
        return shape, classes, routing_iterations

    def make_cnn(shape, classes, architecture, conv, n_digits):
        assert n_digits == (2 if overlap else 1)
        return shape, classes, architecture

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(model, "CapsNet", make_capsnet)
    monkeypatch.setattr(model, "CNN", make_cnn)
    dataset = "multi_MNIST" if overlap else "MNIST"
    words = [f"--dataset={dataset}", f"--rows={row}", "--seeds=5", "--epochs=3"]
    words += [f"--output={tmp_path}"]
    assert main(table1, *words) == 0
    folder, make, train_data, test_data, training, epochs = calls[0]
    assert folder == tmp_path / f"{dataset}_{row}_seed_5"
    side = 36 if overlap else 28
    assert make() == ((side, side, 1), 10, network) and epochs == 3
    assert (training.seed, training.reconstruction_weight) == (5, weight)
    assert (training.batch_size, training.averaging, training.decay_steps) == (
        (32, 0.998, 900) if overlap else (64, 0.99, 300)
    )
    assert (len(train_data.labels), len(test_data.labels)) == (60000, 10000)
    assert train_data.canvas_shape() == test_data.canvas_shape() == (side, side, 1)
    assert train_data.overlap == test_data.overlap == overlap
    assert train_data.max_shift == (4 if overlap else 2)
    assert test_data.max_shift == (4 if overlap else 0)
    assert main(table1, *words, "--train_size=20000") == 0
    fewer, slower = calls[1][2], calls[1][4]
    assert len(fewer.labels) == 20000 and slower.decay_steps == training.decay_steps // 3


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--seeds=3,1", "--rows=1-no,cnn"], [("1-no", 3), ("1-no", 1), ("cnn", 3), ("cnn", 1)]),
        (["--seeds=0"], [(row, 0) for row in ("cnn", "1-no", "1-yes", "3-no", "3-yes")]),
        (["--seeds=0", "--dataset=multi_MNIST"], [(r, 0) for r in ("cnn", "1-yes", "3-yes")]),
    ],
)
def test_all_chosen_rows_are_trained_with_all_seeds_by_default_those_of_the_paper(
    words, expected, tmp_path, monkeypatch, capsys
):
    def run_row(row, seed, values):
        calls.append((row, seed))
        return outcome(seed, 10 + seed)

    calls = []
    monkeypatch.setattr(table1, "run_row", run_row)
    assert main(table1, *words, f"--output={tmp_path}") == 0
    assert calls == expected
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    pairs = [(row, each["training"]["seed"]) for row in written for each in written[row]]
    assert pairs == expected
    lines = table1.table(written, path.stem.removeprefix("table1_"))
    assert "\n".join(lines) in capsys.readouterr().out


# --- Affine transformations -----------------------------------------------------------------------


def test_the_affine_experiment_compares_the_capsnet_with_three_cnns():
    networks = list(affine.NETWORKS.values())
    assert [network.architecture for network in networks] == [None, "affine", "mnist", "authors"]
    assert [network.paper for network in networks] == [79, 66, 66, 66]
    assert len({network.title for network in networks}) == 4


def test_a_transformation_at_rest_moves_the_ink_and_keeps_every_pixel(mnist):
    digit = mnist.x_test[0, ..., 0]
    ink = digit[np.ix_(digit.any(1), digit.any(0))]
    height, width = ink.shape
    for place, (top, left) in {
        (0.0, 0.0): (0, 0),
        (0.999, 0.999): (40 - height, 40 - width),
        (1.0, 0.0): (40 - height, 0),
    }.items():
        moved = affine.transform(digit, affine.transform_matrix(), place)
        np.testing.assert_array_equal(moved[top : top + height, left : left + width], ink)
        assert moved.sum(dtype=int) == digit.sum(dtype=int)


def test_turning_by_a_right_angle_is_that_of_numpy_and_scaling_doubles_the_sides():
    digit = np.zeros((28, 28), np.uint8)
    digit[8:20, 10:14], digit[8:10, 10:20] = 255, 200
    turned = affine.transform(digit, affine.transform_matrix(rotation=90), (0, 0))
    ink = np.rot90(digit, -1)  # clockwise
    ink = ink[np.ix_(ink.any(1), ink.any(0))]
    np.testing.assert_array_equal(turned[: ink.shape[0], : ink.shape[1]], ink)
    block = np.zeros((28, 28), np.uint8)
    block[10:18, 11:17] = 255
    large = affine.transform(block, affine.transform_matrix(scale_y=2), (0, 0)) > 127
    assert (large.any(1).sum(), large.any(0).sum()) == (16, 6)
    sheared = affine.transform(block, affine.transform_matrix(shear=0.5), (0, 0)) > 127
    starts = [np.flatnonzero(row)[0] for row in sheared if row.any()]
    assert starts == sorted(starts) and 3 <= starts[-1] - starts[0] <= 4  # half of 8 rows


def test_a_digit_larger_than_the_canvas_stays_in_its_middle():
    block = np.zeros((28, 28), np.uint8)
    block[4:24, 13:15], block[13:15, 4:24] = 255, 255  # a cross of 20 pixels, 60 once enlarged
    matrix = affine.transform_matrix(scale_y=3, scale_x=3)
    for place in ((0, 0), (1, 1)):
        canvas = affine.transform(block, matrix, place) > 127
        assert canvas[:, 17:23].all() and canvas[17:23].all()
        assert not canvas[:16, :16].any() and not canvas[24:, 24:].any()


@pytest.mark.parametrize(
    "rotation, shear, y, x", [(0, 0, 1, 1), (30, 0.2, 0.8, 1.2), (-90, 0, 2, 1)]
)
def test_the_matrix_is_a_rotation_of_a_shear_of_a_scaling(rotation, shear, y, x):
    matrix = affine.transform_matrix(rotation, shear, y, x)
    a = math.radians(rotation)
    for point in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        px, py = point[0] * x, point[1] * y
        px = px + shear * py
        expected = (px * math.cos(a) - py * math.sin(a), px * math.sin(a) + py * math.cos(a))
        np.testing.assert_allclose(matrix @ point, expected, atol=1e-12)


def test_the_affine_digits_are_fixed_differ_and_are_everywhere_on_the_canvas(mnist):
    images = mnist.x_test[:300]
    made = affine.affine_test_images(images)
    np.testing.assert_array_equal(made, affine.affine_test_images(images))
    assert (made != affine.affine_test_images(images, seed=1)).any()
    assert made.shape == (300, 40, 40, 1) and made.dtype == np.uint8
    assert made.any(axis=(0, 2, 3)).all() and made.any(axis=(0, 1, 3)).all()  # every row, column
    # Shear keeps the ink, and the two scalings change it by 0.64 to 1.44.
    ratio = made.sum(axis=(1, 2, 3), dtype=float) / images.sum(axis=(1, 2, 3), dtype=float)
    assert 0.6 < ratio.min() < 0.75 and 1.3 < ratio.max() < 1.5 and abs(ratio.mean() - 1) < 0.05


def test_affnists_transformations_are_drawn_evenly_between_their_limits(mnist, monkeypatch):
    drawn = []
    matrix = affine.transform_matrix
    monkeypatch.setattr(
        affine, "transform_matrix", lambda *parts: drawn.append(parts) or matrix(*parts)
    )
    affine.affine_test_images(mnist.x_test[:600])
    for values, low, high in zip(
        np.array(drawn).T, (-20, -0.2, 0.8, 0.8), (20, 0.2, 1.2, 1.2), strict=True
    ):
        span = high - low
        assert low <= values.min() < low + span / 20 and high - span / 20 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < span / 15
        assert values.std() == pytest.approx(span / math.sqrt(12), rel=0.1)
    correlations = np.corrcoef(np.array(drawn).T) - np.eye(4)
    assert np.abs(correlations).max() < 0.2


def test_digits_that_are_only_moved_are_where_the_deformed_ones_are(mnist):
    images = mnist.x_test[:200]
    moved = affine.affine_test_images(images, deformed=False)
    np.testing.assert_array_equal(
        moved.sum(axis=(1, 2, 3), dtype=int), images.sum(axis=(1, 2, 3), dtype=int)
    )

    def middles(canvas):
        weights = canvas[..., 0] / canvas.sum(axis=(1, 2, 3), dtype=float)[:, None, None]
        rows, columns = weights.sum(axis=2), weights.sum(axis=1)
        return np.stack([rows @ np.arange(40), columns @ np.arange(40)])

    assert np.abs(middles(moved) - middles(affine.affine_test_images(images))).max() < 5


def test_a_translation_moves_the_ink_from_the_middle_towards_the_four_corners_in_turn():
    image = np.zeros((28, 28, 1), np.uint8)
    image[10:20, 12:16] = 255  # 10 rows and 4 columns of ink: 30 and 36 of the canvas are free
    images = np.stack([image] * 5)
    for value, tops, lefts in (
        (0.0, (15, 15), (18, 18)),
        (0.4, (9, 21), (11, 25)),
        (1.0, (0, 30), (0, 36)),
    ):
        canvases = affine.swept_images(images, "translation", value)
        places = [np.argwhere(canvas)[0, :2] for canvas in canvases]
        corners = [(tops[y], lefts[x]) for y in (0, 1) for x in (0, 1)]
        assert np.abs(np.array(places) - [*corners, corners[0]]).max() <= 1
        assert (canvases.sum(axis=(1, 2, 3)) == image.sum()).all()


def test_a_sweep_changes_its_factor_alone_and_at_rest_nothing(mnist):
    digit = mnist.x_test[:1]
    at_rest = affine.swept_images(digit, "translation", 0.0)[0, ..., 0]
    ink = digit[0][np.ix_(digit[0].any((1, 2)), digit[0].any((0, 2)))][..., 0]
    height, width = ink.shape
    top, left = int(0.5 * (41 - height)), int(0.5 * (41 - width))
    middle = np.zeros((40, 40), np.uint8)
    middle[top : top + height, left : left + width] = ink
    np.testing.assert_array_equal(at_rest, middle)
    for factor, sweep in affine.SWEEPS.items():
        at_rest = 1.0 if factor == "scale" else 0.0
        assert at_rest in sweep.values
        rest = affine.swept_images(digit, factor, at_rest)[0, ..., 0]
        np.testing.assert_array_equal(rest, middle)
    a = math.radians(40)
    for factor, value, matrix in (
        ("rotation", 40.0, [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]),
        ("shear", 0.4, [[1, 0.4], [0, 1]]),
        ("scale", 0.6, [[0.6, 0], [0, 0.6]]),
    ):
        expected = affine.transform(digit[0, ..., 0], np.array(matrix), (0.5, 0.5))
        swept = affine.swept_images(digit, factor, value)[0, ..., 0]
        np.testing.assert_array_equal(swept, expected)
        assert (swept != middle).any()


def test_placed_digits_are_the_same_in_every_call_and_anywhere_within_the_padding():
    data = Examples(np.zeros((500, 28, 28, 1), np.uint8), np.zeros(500, int), 6, 6)
    plan = affine.placed(data)
    np.testing.assert_array_equal(plan.shift, affine.placed(data).shift)
    for axis in (0, 1):
        assert set(plan.shift[..., axis].ravel()) == set(range(-6, 7))
    np.testing.assert_array_equal(plan.index[:, 0], np.arange(500))


def test_a_network_is_trained_to_the_accuracy_asked_for_on_placed_digits_only(
    mnist, tmp_path, monkeypatch
):
    calls = []

    def run(*arguments):
        calls.append(arguments)
        raise errors.UserError("enough")

    monkeypatch.setattr(trial, "run", run)
    words = ["--accuracy=97", "--epochs=4", "--train_size=600", f"--output={tmp_path}"]
    words += ["--decay_steps=50", "--averaging=0.9", "--seed=7"]
    for name, weight in (("capsnet", 0.0005), ("cnn", 0.0)):
        assert main(affine, f"--networks={name}", *words) == 1
        folder, make, train_data, test_data, training, epochs, plan, goal, _ = calls.pop()
        assert folder == tmp_path / name and epochs == 4
        assert (training.seed, training.reconstruction_weight) == (7, weight)
        assert make().config.network == name
        assert (training.decay_steps, training.averaging) == (50, 0.9)
        assert goal.accuracy == 0.97
        for data, shifts in ((goal.data, goal.plan.shift), (test_data, plan.shift)):
            assert data.canvas_shape() == (40, 40, 1) and data.max_shift == 6
            assert (shifts.min(), shifts.max()) == (-6, 6)
        assert train_data.canvas_shape() == (40, 40, 1) and train_data.max_shift == 6
        np.testing.assert_array_equal(test_data.images, mnist.x_test)
        parts = [{image.tobytes() for image in d.images} for d in (train_data, goal.data)]
        assert not parts[0] & parts[1] and len(parts[1]) == 100
        assert parts[0] | parts[1] == {image.tobytes() for image in mnist.x_train[:600]}


@pytest.fixture
def few_digits(mnist, monkeypatch):
    few = mnist._replace(
        x_train=mnist.x_train[:60],
        y_train=mnist.y_train[:60],
        x_test=mnist.x_test[:20],
        y_test=mnist.y_test[:20],
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: few)
    return few


def test_a_network_of_the_affine_experiment_is_tested_once_and_its_table_printed_again(
    small, few_digits, saved, tmp_path, monkeypatch, capsys
):
    words = ["--networks=cnn", "--epochs=1", f"--output={tmp_path}"]
    assert main(affine, *words) == 0
    said = capsys.readouterr().out
    outcome = json.loads((tmp_path / "affine.json").read_text())["cnn"]
    right, anywhere = 5 * outcome["affine_right"], 5 * outcome["places_right"]  # of 20, in percent
    reached = 100 * outcome["held_out_accuracy"]
    assert f"| CNN, pooled | {outcome['parameters']:,} | 1 | {reached:.2f} |" in said
    assert f"| {anywhere:.2f} | {right:.2f} (" in said
    assert "CNN, pooled did not reach 99.23% in 1 epoch; to train longer" in said
    assert [path for path, _ in saved] == [tmp_path / "affine.png"]
    (path,) = tmp_path.glob("cnn_*/checkpoint")
    network = model.CNN((40, 40, 1), 10, "affine")
    load_weights(network, path, print)
    for factor, sweep in affine.SWEEPS.items():
        for value, share in zip(sweep.values, outcome["sweeps"][factor], strict=True):
            images = affine.swept_images(few_digits.x_test, factor, value) / np.float32(255)
            predictions = network(images).numpy().argmax(axis=1)
            assert share == pytest.approx(100 * (predictions == few_digits.y_test).mean())
    monkeypatch.setattr(affine, "test_transformed", None)
    assert main(affine, *words) == 0
    assert capsys.readouterr().out.split("\n|")[1:] == said.split("\n|")[1:]


def test_the_curves_are_the_shares_of_each_factor_on_its_values_and_affnists_range(saved):
    sweeps = {
        name: {factor: [90 + n, 80, 70, 60 - i] for i, factor in enumerate(affine.SWEEPS)}
        for n, name in enumerate(affine.NETWORKS)
    }
    affine.draw("a.png", {name: {"sweeps": values} for name, values in sweeps.items()})
    ((_, figure),) = saved
    limits = {"Rotation": (0, 20), "Shear": (0, 0.2), "Scale": (0.8, 1.2), "Translation": (0, 1)}
    for panel, (factor, sweep) in zip(figure.axes, affine.SWEEPS.items(), strict=True):
        lines = lines_of(panel)
        assert lines == {
            network.title: (list(sweep.values), sweeps[name][factor])
            for name, network in affine.NETWORKS.items()
        }
        assert len({line.get_color() for line in panel.lines}) == len(affine.NETWORKS)
        title = panel.get_title(loc="left")
        (span,) = panel.patches
        left = span.get_x()
        assert (left, left + span.get_width()) == pytest.approx(limits[title])


@pytest.mark.parametrize(
    "right, n, low, high",  # by hand from Wilson's formula
    [(50, 100, 40.383, 59.617), (0, 10, 0.0, 27.753), (7900, 10000, 78.190, 79.787)],
)
def test_the_interval_is_wilsons(right, n, low, high):
    assert affine.interval(right, n) == pytest.approx((low, high), abs=2e-3)


# --- What the recorded runs left ------------------------------------------------------------------


def test_the_published_tables_are_made_from_what_the_experiments_left():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    rows, first_epoch, networks, routed = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("table1_MNIST", "table1_MNIST_1_epoch", "affine", "routing")
    )
    tables = [table1.table(each, "MNIST") for each in (rows, first_epoch)]
    for lines in *tables, affine.table(networks):
        assert "\n" + "\n".join(lines) + "\n" in text
    routing_rows = routing.table(routed["changes"], routed["entropies_bits"])[2:]
    for iteration in (1, 2, 3, 5, 10):
        assert "\n" + routing_rows[iteration - 1] + "\n" in text


def test_the_transformed_digits_are_those_that_the_recorded_runs_were_tested_on(mnist):
    basis = json.loads((RESULTS / "affine.json").read_text())["cnn"]["basis"]
    for name, deformed in (("affine_right", True), ("places_right", False)):
        images = affine.affine_test_images(mnist.x_test, deformed=deformed)
        assert hashlib.sha256(images).hexdigest()[:16] == basis[name]
    for factor, sweep in affine.SWEEPS.items():
        assert basis[factor] == list(sweep.values)


# --- Routing, iteration by iteration --------------------------------------------------------------


def test_measured_routing_is_the_routing_of_the_network_and_of_a_slow_loop():
    u_hat = np.random.default_rng(0).normal(0, 0.5, (3, 4, 5, 6)).astype(np.float32)
    for iterations in (1, 2, 4):
        changes, entropies, v = routing.measure(tf.constant(u_hat), iterations)
        np.testing.assert_array_equal(v, ops.routing(tf.constant(u_hat), iterations))
        b = np.zeros((3, 4, 5))
        for r in range(iterations):
            c = np.exp(b) / np.exp(b).sum(axis=1, keepdims=True)
            entropy = np.mean(
                [-sum(p * math.log2(p) for p in c[n, :, i]) for n in range(3) for i in range(5)]
            )
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


@pytest.mark.parametrize(
    "shape, dataset, found",
    [
        ({"network": "capsnet", "image_shape": [28, 28, 1]}, "kmnist", "capsnet for kmnist"),
        ({"network": "capsnet", "image_shape": [36, 36, 1]}, "mnist", "capsnet for mnist of (36"),
        ({"network": "cnn", "image_shape": [28, 28, 1]}, "mnist", "cnn for mnist"),
    ],
)
def test_weights_of_another_network_or_data_set_are_refused(
    shape, dataset, found, tmp_path, monkeypatch, capsys
):
    metadata = {"shape": shape | {"n_classes": 10}, "training": {"dataset": dataset}}
    monkeypatch.setattr("training.checkpoints.newest_metadata", lambda folder: metadata)
    assert main(routing, f"--checkpoint={tmp_path}", f"--output={tmp_path}") == 1
    said = capsys.readouterr().err
    assert (
        f"{tmp_path} holds a {found}" in said and "expected a capsnet for mnist of (28, 28" in said
    )


def test_the_checkpoint_that_is_named_is_measured_whatever_its_sizes(tmp_path, monkeypatch):
    shape = {"network": "capsnet", "image_shape": [20, 20, 1], "n_classes": 10, "n_conv": 7}
    metadata, folders = {"shape": shape, "training": {"dataset": "mnist"}, "step": 7}, []
    monkeypatch.setattr("training.checkpoints.newest_metadata", lambda folder: metadata)
    monkeypatch.setattr(
        "training.checkpoints.load_weights",
        lambda network, folder, report: folders.append(folder) or metadata,
    )
    network, loaded = routing.load_network((20, 20, 1), "some/folder")
    assert folders == ["some/folder"] and loaded is metadata
    assert network.config.n_conv == 7


def test_a_folder_without_weights_is_said_with_what_to_give(tmp_path, capsys):
    words = [f"--checkpoint={tmp_path}", f"--output={tmp_path}", "--images=2"]
    assert main(routing, *words) == 1
    assert capsys.readouterr().err == (
        f"routing.py: no checkpoint in {tmp_path}; give the folder of a trained network\n"
    )


def test_routing_of_the_trained_network_is_measured_over_all_images_and_drawn(
    mnist, tmp_path, monkeypatch, capsys, saved
):
    monkeypatch.setattr(routing, "BATCH_SIZE", 8)  # and a last batch of 4
    assert main(routing, "--images=20", "--iterations=3", f"--output={tmp_path}") == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "routing.json").read_text())
    network, metadata = routing.load_network((28, 28, 1), None)
    u = network.primary(network.conv1(mnist.x_test[:20] / np.float32(255)))
    changes, entropies, _ = routing.measure(ops.votes(u, network.digits.W.value), 3)
    assert result["changes"] == pytest.approx(changes, rel=1e-4)
    assert result["entropies_bits"] == pytest.approx(entropies, rel=1e-5)
    assert entropies[0] == pytest.approx(math.log2(10), abs=1e-5)  # all couplings are equal
    assert (result["images"], result["step"]) == (20, metadata["step"])
    assert f"| 3 | {changes[2]:.5f} | {entropies[2]:.4f} |" in said
    ((path, figure),) = saved
    assert path == tmp_path / "routing.png"
    left, right = figure.axes
    (drawn,) = lines_of(left).values()
    assert drawn == ([1, 2, 3], pytest.approx(changes, rel=1e-4))
    curve, equal = lines_of(right).values()
    assert curve == ([1, 2, 3], pytest.approx(entropies, rel=1e-5))
    assert equal[1] == pytest.approx([math.log2(10)] * 2)


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, words",
    [
        (table1, "--rows=2-yes"),
        (table1, "--rows=cnn,cnn"),
        (table1, "--rows="),
        (table1, "--seeds=a"),
        (table1, "--seeds=1,1"),
        (table1, "--seeds=5000000000"),
        (table1, "--seeds=-1"),
        (table1, "--epochs=0"),
        (table1, "--epochs=1.5"),
        (table1, "--dataset=x"),
        (table1, "--output="),
        (affine, "--networks=resnet"),
        (affine, "--accuracy=0.99"),
        (affine, "--accuracy=101"),
        (affine, "--accuracy=nan"),
        (affine, "--accuracy=x"),
        (routing, "--iterations=0"),
        (routing, "--iterations=101"),
        (routing, "--images=0"),
        (routing, "--unknown=1"),
        (routing, "--nooutput=x"),
        (routing, "stray"),
    ],
)
def test_wrong_words_are_usage_errors(program, words, capsys):
    assert main(program, words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{program.__name__}.py: ") and said.count("\n") == 1
    assert words.split("=")[0].lstrip("-") in said and said.endswith(("; see --help\n", "?\n"))


def test_values_have_the_types_of_their_flags_and_defaults():
    def values(program, *words):
        return command_line.parse(["x", *words], program.FLAGS).flag_values_dict()

    assert values(table1) == {
        "rows": None,
        "seeds": [0, 1, 2],
        "epochs": 10,
        "dataset": "MNIST",
        "train_size": None,
        "data_dir": str(ROOT / "data"),
        "output": "runs/table1",
    }
    given = values(table1, "--rows=3-no,cnn", "--seeds=7", "--epochs", "2", "--train_size=600")
    assert (given["rows"], given["seeds"]) == (["3-no", "cnn"], [7])
    assert (given["epochs"], given["train_size"]) == (2, 600)
    assert values(affine) == {
        "networks": ["capsnet", "cnn", "cnn_section5", "cnn_authors"],
        "accuracy": 99.23,
        "epochs": 20,
        "decay_steps": 3000,
        "averaging": 0.998,
        "seed": 0,
        "train_size": None,
        "data_dir": str(ROOT / "data"),
        "output": "runs/affine",
    }
    assert values(affine, "--accuracy=100")["accuracy"] == 100
    assert values(routing) == {
        "iterations": 10,
        "checkpoint": None,
        "output": "runs/routing",
        "data_dir": str(ROOT / "data"),
        "images": 10000,
    }
    assert values(routing, "--iterations=100")["iterations"] == 100


def test_missing_data_are_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for program in (table1, affine, routing):
        assert main(program, f"--data_dir={tmp_path / 'none'}", f"--output={tmp_path}") == 1
        said = capsys.readouterr().err
        advice = f"; run: python {DOWNLOAD} mnist --data_dir={tmp_path / 'none'}\n"
        assert said.count("\n") == 1 and said.endswith(advice)
