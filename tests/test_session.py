import hashlib
import re
import shutil
from pathlib import Path

import commands.session
import numpy as np
import pytest
import tensorflow as tf
from commands.session import Session
from PIL import Image
from story import (
    FAST,
    ROOT,
    assert_refused,
    last_values,
    load_all,
    make_session,
    run,
    save_checkpoint,
    small_network,
)

import commands.train
import main
from capsnet.errors import DataFileError, NetworkMismatch, NoCheckpoint, UsageError, UserError
from commands.train import make_trainer
from inputs import datasets
from inputs.appearance import KEY, PLAIN, Appearance, measure_appearance
from runtime import machine

pytest_plugins = ["story_fixtures"]


def session_of(*words):
    argv = ["main.py", *last_values(words)]
    return Session(main.parse(argv), argv)


# ---------------------------------------------------------------- each flag makes its difference


@pytest.mark.parametrize(
    "flag, read",
    [
        ("n_conv=7", lambda net: net.conv1.kernel.shape[-1]),
        ("n_primary=3", lambda net: net.digits.W.shape[1] / 36),  # 6×6 positions
        ("primary_dim=5", lambda net: net.digits.W.shape[2]),
        ("digit_dim=6", lambda net: net.digits.W.shape[3]),
        ("routing_iterations=2", lambda net: net.digits.iterations),
    ],
)
def test_the_network_has_the_sizes_that_the_flags_give(few, flag, read):
    name, value = flag.split("=")
    assert read(session_of(*FAST).network) != int(value)
    network = session_of(*FAST, f"--{flag}").network
    assert read(network) == network.architecture[name] == int(value)


def test_the_default_network_is_that_of_the_paper(few):
    assert session_of().network.count_params() == 8_215_568
    assert session_of("--multi_MNIST").network.count_params() == 11_361_808


def rate_after_500_steps(trainer):
    trainer.optimizer.iterations.assign(500)
    return float(trainer.optimizer.learning_rate)


@pytest.mark.parametrize(
    "flag, default, changed, read",
    [
        ("learning_rate=0.01", 0.001 * 0.7**0.5, 0.01 * 0.7**0.5, rate_after_500_steps),
        ("decay_rate=0.1", 0.001 * 0.7**0.5, 0.001 * 0.1**0.5, rate_after_500_steps),
        ("decay_steps=250", 0.001 * 0.7**0.5, 0.001 * 0.7**2, rate_after_500_steps),
        (
            "reconstruction_weight=0.25",
            3.001,
            3.5,
            lambda t: t.config.total_loss({"margin": 3, "reconstruction": 2}),
        ),
        ("averaging=0.5", 0.99, 0.5, lambda t: t.optimizer.largest_momentum),
        ("averaging=0", True, False, lambda t: t.optimizer.use_ema),
        ("batch_size=100", 7, 4, lambda t: t.steps_per_epoch),  # of 400 images
        ("train_size=64", 7, 1, lambda t: t.steps_per_epoch),
        ("seed=5", 0, 5, lambda t: t.config.seed),
    ],
)
def test_the_trainer_has_the_settings_that_the_flags_give(few, flag, default, changed, read):
    assert read(make_trainer(session_of(*FAST), print)) == pytest.approx(default)
    trainer = make_trainer(session_of(*FAST, f"--{flag}"), print)
    assert read(trainer) == pytest.approx(changed)
    name, value = flag.split("=")
    assert trainer.metadata["training"][name] == float(value)


def test_the_recipe_of_the_authors_reaches_trainer_and_network(few):
    session = session_of(*FAST, "--recipe=authors")
    trainer = make_trainer(session, print)
    assert trainer.steps_per_epoch == 4  # of 128 images
    assert rate_after_500_steps(trainer) == pytest.approx(0.001 * 0.96**0.25)
    assert trainer.config.total_loss({"margin": 1, "reconstruction": 1}) == pytest.approx(1.01)
    assert not trainer.optimizer.use_ema
    assert session.network.conv1.bias.numpy().tolist() == pytest.approx([0.1] * 8)
    assert session.network.primary.coupling == 1 / session.network.primary.n_types
    assert session.network.digits.bias.shape == session.network.digits.W.shape[::3]
    assert session.train_data.max_shift == 2


def test_overlapping_digits_are_shifted_by_as_much_as_the_flag_says(few):
    for words, shift in ([], 4), (["--multi_shift=6"], 6), (["--recipe=authors"], 6):
        session = session_of(*FAST, "--multi_MNIST", *words)
        for data in (session.train_data, session.test_data):
            assert (data.max_shift, data.padding, data.canvas_shape()) == (shift, 4, (36, 36, 1))
        shifts = session.test_data.evaluation_plan().shift
        assert (shifts.min(), shifts.max()) == (-shift, shift)
        named = make_trainer(session, print).metadata["training"].get("multi_shift")
        assert named == (None if shift == 4 else shift)  # runs from before the flag resume


def test_initialization_says_how_the_first_weights_are_drawn(few):
    glorot, authors = (
        session_of("--n_conv=64", f"--initialization={name}").network
        for name in ("glorot", "authors")
    )
    assert not glorot.conv1.bias.numpy().any() and not glorot.primary.bias.numpy().any()
    limit = np.sqrt(6 / (9 * 9 * 64 + 9 * 9 * 256))  # of Glorot's uniform distribution
    assert 0.99 * limit < np.abs(glorot.primary.kernel.numpy()).max() <= limit
    for layer, stddev in (authors.conv1, 0.05), (authors.primary, 0.1):
        np.testing.assert_allclose(layer.bias.numpy(), 0.1)
        kernel = layer.kernel.numpy()
        assert kernel.std() == pytest.approx(0.88 * stddev, rel=0.05)  # cut at two deviations
        assert np.abs(kernel).max() <= 2 * stddev


def test_the_seed_decides_the_first_weights(few):
    first, same, other = (
        session_of(*FAST, f"--seed={seed}").network.get_weights() for seed in (3, 3, 4)
    )
    assert len(first) == len(other) > 5
    for one, again, different in zip(first, same, other, strict=True):
        np.testing.assert_array_equal(one, again)
        assert not one.any() or (one != different).mean() > 0.9  # the biases are 0


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "words, on_cpu, on_gpu",
    [
        ([], ("dft", True), ("direct", True)),
        (["--conv=direct"], ("direct", False), ("direct", True)),
        (["--conv=dft"], ("dft", True), ("dft", True)),
        (["--jit=off"], ("dft", False), ("direct", False)),
        (["--conv=direct", "--jit=on"], ("direct", True), ("direct", True)),
    ],
)
def test_convolution_and_compiler_suit_the_device_unless_flags_choose_them(
    few, monkeypatch, gpu, words, on_cpu, on_gpu
):
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    conv, jit = on_gpu if gpu else on_cpu
    session = session_of("--n_conv=5", "--n_primary=1", *words)
    assert (session.network.settings["conv"], session.jit) == (conv, jit)
    assert session.network.primary.method == conv
    given = {}
    monkeypatch.setattr(commands.train, "Trainer", lambda *_, **options: given.update(options))
    make_trainer(session, print)
    assert given["jit"] is jit


def test_half_precision_needs_an_accelerator_or_a_processor_with_units_for_it(few, monkeypatch):
    word = "--precision=mixed_bfloat16"
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "bfloat16_units", lambda: [])
    with pytest.raises(UsageError, match="AMX or AVX512-BF16.*expected --precision=float32"):
        session_of(*FAST, word)
    assert session_of(*FAST).network.dtype_policy.name == "float32"
    monkeypatch.setattr(machine, "bfloat16_units", lambda: ["AMX"])
    assert session_of(*FAST, word).network.dtype_policy.name == "mixed_bfloat16"
    monkeypatch.setattr(machine, "bfloat16_units", lambda: [])
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert session_of(*FAST, word).network.dtype_policy.name == "mixed_bfloat16"


def test_deterministic_operations_are_switched_on_only_by_their_flag(few, monkeypatch):
    calls = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: calls.append("on"))
    session_of(*FAST)
    assert calls == []
    session_of(*FAST, "--deterministic")
    assert calls == ["on"]


@pytest.mark.parametrize("name", ["auto", "one", "mirrored"])
def test_the_network_is_created_under_the_strategy_that_the_flag_names(few, monkeypatch, name):
    asked, strategy = [], tf.distribute.OneDeviceStrategy("/cpu:0")
    monkeypatch.setattr(
        commands.session,
        "choose_strategy",
        lambda name, waiting: asked.append((name, hasattr(waiting, "__enter__"))) or strategy,
    )
    session = session_of(*FAST, f"--strategy={name}")
    assert asked == [(name, True)]
    with strategy.scope():
        assert session.network is session.network
    given = {}
    monkeypatch.setattr(commands.train, "Trainer", lambda *_, **options: given.update(options))
    make_trainer(session, print)
    assert given["strategy"] is strategy and session.chief


def test_each_folder_is_that_of_its_flag(few):
    words = ["--checkpoint_dir=a", "--val_checkpoint_dir=b", "--multi_checkpoint_dir=c"]
    assert session_of(*FAST, *words, "--logdir=d").folders == (
        Path("a/mnist"),
        Path("b/mnist"),
        Path("d/mnist"),
    )
    assert session_of(*FAST, *words, "--multi_MNIST", "--logdir=d").folders == (
        Path("c/multi_mnist"),
        Path("b/multi_mnist"),
        Path("d/multi_mnist"),
    )
    assert session_of(*FAST, "--pretrained").folders.logs == Path("logs/mnist_pretrained")


# ---------------------------------------------------------------- the data


def shifts(plan):
    return [np.unique(plan.shift[..., axis]).tolist() for axis in (0, 1)]


def test_training_digits_are_shifted_by_two_pixels_if_asked_for_and_test_digits_never(few):
    plain, deformed = session_of(*FAST), session_of(*FAST, "--data_deformation")
    assert shifts(plain.train_data.training_plan(0, 0)) == [[0], [0]]
    assert shifts(deformed.train_data.training_plan(0, 0)) == [[-2, -1, 0, 1, 2]] * 2
    for session in (plain, deformed):
        assert shifts(session.test_data.evaluation_plan()) == [[0], [0]]
        for data in (session.train_data, session.test_data):
            assert data.canvas_shape() == (28, 28, 1) and data.digits_per_example == 1


@pytest.mark.parametrize("words", [[], ["--data_deformation"]])
def test_overlapping_digits_are_shifted_by_four_pixels_on_a_canvas_of_36(few, words):
    session = session_of(*FAST, "--multi_MNIST", *words)
    plans = session.train_data.training_plan(0, 0), session.test_data.evaluation_plan()
    for data, plan in zip((session.train_data, session.test_data), plans, strict=True):
        assert shifts(plan) == [list(range(-4, 5))] * 2
        assert data.canvas_shape() == (36, 36, 1) and data.digits_per_example == 2
        assert data.padding == 4
        labels = data.labels[plan.index]
        assert (labels[:, 0] != labels[:, 1]).all()


def test_training_and_test_images_are_those_of_the_data_set(few):
    session = session_of(*FAST, "--train_size=300")
    np.testing.assert_array_equal(session.train_data.images, few.x_train[:300])
    np.testing.assert_array_equal(session.train_data.labels, few.y_train[:300])
    np.testing.assert_array_equal(session.test_data.images, few.x_test)
    np.testing.assert_array_equal(session.test_data.labels, few.y_test)


def test_more_training_images_than_there_are_is_the_same_run_as_all_of_them(few):
    for words in [], ["--train_size=400"], ["--train_size=500"]:
        session = session_of(*FAST, *words)
        assert session.train_size == 0 and len(session.train_data.labels) == 400
    session = session_of(*FAST, "--train_size=399")
    assert session.train_size == 399 and len(session.train_data.labels) == 399


def test_the_fingerprint_of_the_data_is_that_of_images_and_labels(few):
    session = session_of(*FAST)
    for size in (0, 300):
        kept = slice(size or None)
        content = few.x_train[kept].tobytes() + few.y_train[kept].astype(np.int32).tobytes()
        assert session.digest(size) == hashlib.sha256(content).hexdigest()[:16]


@pytest.fixture
def own_images(tmp_path, monkeypatch):
    """A .npz file of 60 images, sorted by their three classes."""
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 20), np.uint8)
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    np.savez("own.npz", x_train=images, y_train=labels, x_test=images[::9], y_test=labels[::9])
    return images[..., None], labels


def test_of_a_sorted_file_some_images_of_each_class_are_trained_drawn_by_the_seed(own_images):
    words = [*FAST, "--dataset=own.npz", "--train_size=12"]
    session, other = session_of(*words), session_of(*words, "--seed=1")
    assert np.bincount(session.train_data.labels).tolist() == [4, 4, 4]
    assert session.digest(12) != other.digest(12) and session.digest(0) == other.digest(0)
    settings = {"train_size": 12, "seed": 0, "data": session.digest(12)}
    assert session.has_images_of(settings) and other.has_images_of(settings)
    assert not session.has_images_of(settings | {"seed": 1})


def test_runs_of_earlier_versions_trained_on_the_first_images_and_are_known(own_images):
    images, labels = own_images
    session = session_of(*FAST, "--dataset=own.npz")
    content = hashlib.sha256(images[:12].tobytes() + labels[:12].tobytes()).hexdigest()[:16]
    assert session.has_images_of({"train_size": 12, "data": content})
    assert not session.has_images_of({"train_size": 11, "data": content})
    assert not session.has_images_of({"train_size": 0, "data": content})


def test_the_data_of_the_program_are_used_from_anywhere_unless_another_folder_is_named(
    tmp_path, few, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, folder, *_: asked.append((name, str(folder))) or few
    )
    monkeypatch.chdir(tmp_path)
    assert session_of().dataset is few
    assert session_of("--data_dir=mine", "--dataset=kmnist").dataset is few
    (tmp_path / "data/mnist").mkdir(parents=True)
    for name in ("mnist", "kmnist"):  # which is not there
        assert session_of(f"--dataset={name}").dataset is few
    assert asked == [
        *(("mnist", str(ROOT / "data")), ("kmnist", "mine")),
        *(("mnist", "data"), ("kmnist", str(ROOT / "data"))),
    ]


# ---------------------------------------------------------------- loading weights


@pytest.fixture
def saved(tmp_path, few, monkeypatch):
    """A folder with a checkpoint of the default run, never trained."""
    monkeypatch.chdir(tmp_path)
    session = session_of(*FAST)
    save_checkpoint(Path("checkpoint/mnist"), session.network, data=session.digest(0))
    return session.network


def test_loading_restores_the_weights_and_says_where_they_come_from(saved, capsys):
    session = session_of(*FAST, "--test", "--seed=9")
    session.load()
    for value, expected in zip(session.network.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)
    assert session.metadata["step"] == 15
    assert capsys.readouterr().out == "Weights of step 15 from checkpoint/mnist\n"


def test_weights_of_other_images_are_announced(saved, few, capsys):
    save_checkpoint(Path("checkpoint/mnist"), saved, data=session_of(*FAST).digest(7))
    session_of(*FAST, "--test").load()
    assert "trained on images that differ" in capsys.readouterr().out
    size = {"train_size": 7, "data": session_of(*FAST).digest(7)}
    save_checkpoint(Path("checkpoint/mnist"), saved, **size)
    session_of(*FAST, "--test").load()  # of the first seven, and these are there
    assert "that differ" not in capsys.readouterr().out


@pytest.fixture
def no_data(monkeypatch):
    """Make every attempt to read a data set fail."""

    def fail(name, folder, *_):
        raise DataFileError(folder, "no such file", name)

    monkeypatch.setattr(datasets, "load_dataset", fail)


@pytest.mark.parametrize("word", ["--predict=x", "--export=new"])
def test_predicting_and_exporting_need_the_weights_alone(saved, no_data, word, capsys):
    names, style = tuple("abcdefghij"), {"ink_style": None, "ground": "light"}
    save_checkpoint(Path("checkpoint/mnist"), saved, {KEY: style}, class_names=list(names))
    session = session_of(*FAST, word)
    session.load()
    for value, expected in zip(session.network.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)
    assert session.class_names == names and session.digits_per_example == 1
    assert session.appearance == Appearance(None, "light")
    assert capsys.readouterr().out == "Weights of step 15 from checkpoint/mnist\n"


@pytest.mark.parametrize("mode", ["test", "reconstruction_test", "tweak_test"])
def test_other_modes_read_the_data_set(saved, no_data, mode):
    with pytest.raises(DataFileError):
        session_of(*FAST, f"--{mode}", "--predict=x").load()


def test_the_network_has_the_images_and_classes_of_its_weights(tmp_path, no_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = small_network((20, 24, 3), 4)
    save_checkpoint(Path("checkpoint/mnist"), network, class_names=list("abcd"))
    session = session_of(*FAST, "--predict=x")
    session.load()
    assert session.network.settings["image_shape"] == (20, 24, 3)
    assert session.network.settings["n_classes"] == 4
    with pytest.raises(NetworkMismatch, match="n_conv is 8 there and 9 here"):
        session_of(*FAST, "--predict=x", "--n_conv=9").load()
    with pytest.raises(NoCheckpoint, match="elsewhere"):
        session_of(*FAST, "--predict=x", "--checkpoint_dir=elsewhere").load()


def test_older_weights_take_the_look_of_the_data_set_if_it_is_there(saved, few, capsys):
    session = session_of(*FAST, "--predict=x")
    session.load()
    expected = measure_appearance(session_of(*FAST).train_data)
    assert session.appearance == expected and expected.ink_style is not None
    save_checkpoint(Path("checkpoint/mnist"), saved, data=session.digest(7))
    session = session_of(*FAST, "--predict=x")
    session.load()
    assert "that differ" not in capsys.readouterr().out  # before the data are needed
    assert session.appearance == expected
    assert "images that differ" in capsys.readouterr().out


def test_older_weights_without_their_data_set_say_that_files_are_only_fitted(
    saved, no_data, capsys
):
    save_checkpoint(Path("checkpoint/mnist"), saved, dataset="mnist")
    session = session_of(*FAST, "--predict=x")
    session.load()
    assert session.class_names == tuple("0123456789")
    assert session.appearance == PLAIN
    out = capsys.readouterr().out
    assert "do not say how their training images look" in out and "resized whole" in out
    save_checkpoint(Path("checkpoint/mnist"), saved)  # and they do not name their classes either
    session = session_of(*FAST, "--predict=x")
    session.load()
    with pytest.raises(DataFileError):
        print(session.class_names)


def test_weights_for_other_classes_are_refused(tmp_path, saved):
    names = list("abcdefghij")
    save_checkpoint(Path("checkpoint/mnist"), saved, class_names=names)
    result = run(tmp_path, "--test", *FAST)
    assert_refused(result, 1, "trained on other classes: ['a', 'b'", "'0', '1'", "--dataset")
    save_checkpoint(Path("checkpoint/mnist"), saved, class_names=list("0123456789"))
    session_of(*FAST, "--test").load()


@pytest.mark.parametrize("folder", ["checkpoint", "val_checkpoint"])
def test_the_best_weights_are_loaded_only_with_validation_check(saved, folder, capsys):
    words = ["--validation_check"] if folder == "val_checkpoint" else []
    other = session_of(*FAST, "--seed=1").network
    save_checkpoint(Path("val_checkpoint/mnist"), other, step=13)
    session = session_of(*FAST, "--predict=x", *words)
    session.load()
    expected = other if words else saved
    np.testing.assert_array_equal(session.network.conv1.kernel, expected.conv1.kernel)
    assert f"from {folder}/mnist" in capsys.readouterr().out


@pytest.mark.parametrize("mode", main.MODES[1:])
def test_a_folder_of_events_is_claimed_by_the_modes_that_use_it(saved, mode):
    value = {"export": "=new", "predict": "=x"}.get(mode, "")
    session_of(*FAST, f"--{mode}{value}").load()
    claim = Path("logs/mnist/run")
    assert claim.exists() is (mode != "predict")
    if claim.exists():
        assert (claim.parent / claim.read_text().strip()).resolve() == Path(
            "checkpoint/mnist"
        ).resolve()


def test_events_of_another_run_are_not_mixed_with_those_of_these_weights(tmp_path, saved):
    assert run(tmp_path, "--tweak_test", "--tweak_num=1", *FAST).code == 0
    shutil.copytree("checkpoint", "elsewhere")
    result = run(tmp_path, "--tweak_test", *FAST, "--checkpoint_dir=elsewhere")
    assert_refused(result, 1, "logs/mnist belongs to the run in", "--logdir")


def test_a_picture_for_tensorboard_replaces_that_of_the_command_before(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = make_session(*FAST)
    for grey in (50, 200):
        session.show_picture("reconstructions", np.full((5, 7, 3), grey, np.uint8))
    session.show_picture("tweaks", np.zeros((2, 2, 3), np.uint8))
    paths = sorted(Path("logs/mnist/test").iterdir(), key=lambda path: path.suffix)
    assert [path.suffix for path in paths] == [".reconstructions", ".tweaks"]
    records = tf.data.TFRecordDataset(str(paths[0])).as_numpy_iterator()
    events = [tf.compat.v1.Event.FromString(record) for record in records]
    (event,) = (event for event in events if event.summary.value)
    (value,) = event.summary.value
    assert (event.step, value.tag) == (15, "reconstructions")
    picture = tf.io.decode_png(value.tensor.string_val[2]).numpy()
    np.testing.assert_array_equal(picture, np.full((5, 7, 3), 200))


def test_pretrained_weights_are_sought_by_the_name_of_the_data_set(tmp_path, few, monkeypatch):
    sought, metadata = [], {"training": {"data": "", "train_size": 0}, "step": 1}
    monkeypatch.setattr(
        commands.session,
        "load_pretrained",
        lambda network, folder: sought.append(folder) or metadata,
    )
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", 0)
    for words in [], ["--multi_MNIST"], ["--dataset=./own.npz"]:
        session_of(*FAST, "--pretrained", "--test", *words).load()
    names = [str(path.relative_to(ROOT / "pretrained")) for path in sought]
    assert names == ["mnist", "multi_mnist", "own"]


def test_images_too_small_for_the_network_are_refused_with_the_smallest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    images = np.zeros((4, 16, 30), np.uint8)
    labels = np.arange(4)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    result = run(tmp_path, "--dataset=a.npz", "--train")
    assert_refused(result, 1, "at least 17×17 pixels", "16, 30", "give a --dataset of larger")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


# ---------------------------------------------------------------- data sets of other forms


def test_what_was_changed_in_the_data_is_printed_once_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    stream = np.random.default_rng(0)
    images, labels = stream.integers(0, 2, (24, 17, 17)), np.arange(24) % 2 + 1
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    words = [*FAST, "--dataset=a.npz", "--train", "--test", "--epoch=1", "--batch_size=12"]
    result = run(tmp_path, *words)
    assert result.code == 0, result.err
    notes = ["a: images are int64 from 0 to 1, scaled", "a: 2 different labels from 1 to 2"]
    for note in notes:
        assert result.out.count(note) == 1
        assert result.out.index(note) < result.out.index("training images of")
    assert re.search(r"^Accuracy per class: 1 \S+%, 2 \S+%$", result.out, re.MULTILINE)


def photos(root, splits=("",), count=12):
    """Coloured images of two classes and of several sizes."""
    stream = np.random.default_rng(0)
    for split in splits:
        for channel, name in (0, "red"), (2, "blue"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((*stream.integers(20, 60, 2), 3), 30, np.uint8)
                pixels[..., channel] = stream.integers(150, 256)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")


def test_images_of_several_sizes_need_a_size_that_they_are_made_to_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    result = run(tmp_path, "--dataset=photos", "--train", *FAST)
    assert_refused(result, 1, "pixels, expected", "give an --image_size=HxW")
    session = session_of(*FAST, "--dataset=photos", "--image_size=20x24")
    assert session.train_data.canvas_shape() == (20, 24, 3)
    assert len(session.train_data.labels) == 20 and len(session.test_data.labels) == 4
    trainer = make_trainer(session, print)
    assert trainer.metadata["training"]["image_size"] == "20x24"


@pytest.mark.parametrize("size", ["20", "0x20", "20x", "20x1025", "20x20x3", "-1x5", "axb"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    assert_refused(run(tmp_path, "--train", f"--image_size={size}"), 2, "expected height and width")


def test_a_run_without_an_image_size_does_not_name_one(few):
    training = make_trainer(session_of(*FAST), print).metadata["training"]
    assert not {"image_size", "inverted", "validation_data"} & set(training)


def test_the_validation_images_of_a_data_set_are_those_of_validation_check(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", ("train", "val", "test"))
    words = [*FAST, "--dataset=photos", "--image_size=20x20"]
    trainer = make_trainer(session_of(*words), print)
    assert trainer.validation is None and len(trainer.data.labels) == 24
    assert "24 validation images are only used with --validation_check" in capsys.readouterr().out
    session = session_of(*words, "--validation_check")
    trainer = make_trainer(session, print)
    assert "24 validation images choose the best weights" in capsys.readouterr().out
    assert len(trainer.data.labels) == 24
    np.testing.assert_array_equal(trainer.validation.images, session.dataset.x_validation)
    np.testing.assert_array_equal(trainer.validation.labels, session.dataset.y_validation)
    first = trainer.metadata["training"]["validation_data"]
    (tmp_path / "photos/val/red/0.jpg").unlink()
    again = make_trainer(session_of(*words, "--validation_check"), print)
    assert again.metadata["training"]["validation_data"] != first


def ink_files(folder, invert=False, channels=1, background=0):
    """A .npz file of light ink on a dark background, or inverted."""
    images = np.full((24, 20, 20, channels), background, np.uint8)
    images[:, 5:15, 9:11] = 255
    images = 255 - images if invert else images
    labels = np.arange(24) % 2
    np.savez(folder / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return images


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_overlapping_digits_of_dark_ink_are_overlaid_by_their_ink(
    tmp_path, monkeypatch, invert, channels
):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    ink_files(tmp_path, invert, channels)
    data = session_of(*FAST, "--dataset=a.npz", "--multi_MNIST").train_data
    assert not data.images[:, 0].any() and (data.images[:, 5:15, 9:11] == 255).all()


def test_coloured_images_shift_on_the_background_of_their_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    images = ink_files(tmp_path, invert=True, channels=3, background=20)
    session = session_of(*FAST, "--dataset=a.npz", "--data_deformation")
    np.testing.assert_array_equal(session.train_data.images, images)
    assert session.train_data.background.tolist() == [235, 235, 235]
    assert make_trainer(session, print).metadata["training"]["ground"] == [235, 235, 235]
    assert session.test_data.background is None  # which is not shifted


def test_grey_images_of_dark_ink_are_inverted_and_the_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    images = ink_files(tmp_path, invert=True)
    session = session_of(*FAST, "--dataset=a.npz", "--data_deformation")
    np.testing.assert_array_equal(session.train_data.images, 255 - images)
    assert make_trainer(session, print).metadata["training"]["inverted"] is True
    with tf.device("CPU"):
        network = session.network
    for inverted in ({"inverted": True}, {}):  # an earlier version did not invert them
        save_checkpoint(Path("checkpoint/a"), network, class_names=["0", "1"], **inverted)
        other = session_of(*FAST, "--dataset=a.npz", "--test")
        if inverted:
            other.load()
            continue
        with pytest.raises(
            UserError, match="trained on dark ink on a light background.*train again"
        ):
            other.load()


def test_weights_are_not_tested_on_images_that_they_were_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    words = [*FAST, "--dataset=photos", "--image_size=20x20", "--seed=3"]
    session = session_of(*words)
    training = make_trainer(session, print).metadata["training"]
    assert training["held_out_seed"] == 3
    save_checkpoint(Path("checkpoint/photos"), session.network, **training | {"averaging": 0})
    session_of(*words, "--test").load()
    with pytest.raises(UserError, match="trained on; give --seed=3"):
        session_of(*words[:-1], "--test", "--seed=4").load()
    other = session_of(*words[:-1], "--seed=4")
    other.check_unseen("exported", training | {"dataset": "other photos"})
    # One file more, and the same seed draws other test images.
    shutil.copy(tmp_path / "photos/blue/0.jpg", tmp_path / "photos/blue/00.jpg")
    with pytest.raises(UserError, match="images of photos have changed since the training"):
        session_of(*words, "--test").load()


def test_images_of_two_channels_are_trained_tested_and_drawn_but_not_predicted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    ink_files(tmp_path, channels=2)
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    words = [*FAST, "--dataset=a.npz", "--epoch=1", "--batch_size=12", "--validation_check"]
    result = run(tmp_path, *words, "--train", "--test", "--reconstruction_test", "--tweak_test")
    assert result.code == 0 and result.err == "", result.err
    refusal = run(tmp_path, *words, "--predict=a.png")
    assert_refused(refusal, 1, "images of 2 channels", "expected one of 1 or 3")


@pytest.mark.parametrize("conv", ["direct", "dft"])
def test_images_below_17_pixels_need_a_smaller_kernel(tmp_path, monkeypatch, conv):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8)).astype(np.uint8)
    labels = np.arange(24) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    words = [*FAST, "--dataset=a.npz", "--train", "--epoch=1", "--batch_size=12", f"--conv={conv}"]
    assert_refused(run(tmp_path, *words), 1, "at least 17×17", "a smaller --kernel_size")
    result = run(tmp_path, *words, "--kernel_size=3")
    assert result.code == 0 and "conv1             6 × 6 × 8" in result.out
    words.remove("--train")
    assert_refused(run(tmp_path, *words, "--test", "--kernel_size=4"), 1, "kernel_size")
