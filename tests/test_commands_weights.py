"""Weights say which network they are for; what may be loaded, started with, and left as it is."""

import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from story import (
    FAST,
    QUICK,
    ROOT,
    RUN,
    SMALL,
    Command,
    assert_refused,
    files,
    load_all,
    run,
    save_checkpoint,
    save_exported,
    small_network,
    varied_network,
    weights_of,
)

import main
import utils
from capsnet_core import config
from capsnet_core.cnn import CNN
from capsnet_core.errors import (
    DataFileError,
    NoCheckpoint,
    NoPretrainedWeights,
    PretrainedMismatch,
    UserError,
)
from capsnet_core.metadata import differences
from capsnet_core.networks import CNNConfig
from commands.data import fingerprint
from commands.weights import (
    appearance_of,
    assign,
    build_network,
    check_data,
    check_unseen,
    find_exported,
    load_network,
    read_exported,
    start_with,
)
from inputs import datasets
from inputs.appearance import KEY, PLAIN, Appearance, measure_appearance
from inputs.pipeline import Examples
from model import CapsNet
from training.checkpoints import load_weights
from training.evaluation import Evaluator

pytest_plugins = ["story_fixtures"]

CHECKPOINT = Path("checkpoint/mnist")
OLD_RUN = ROOT / "tests" / "fixtures" / "old_run"


def assert_same(values, expected):
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, other)


# ---------------------------------------------------------------- a new network


@pytest.mark.parametrize(
    "flag, read",
    [
        ("n_conv=7", lambda net: net.conv1.kernel.shape[-1]),
        ("n_primary=3", lambda net: net.digits.W.shape[1] / 36),  # 6×6 positions
        ("primary_dim=5", lambda net: net.digits.W.shape[2]),
        ("digit_dim=6", lambda net: net.digits.W.shape[3]),
        ("routing_iterations=2", lambda net: net.digits.iterations),
        ("kernel_size=7", lambda net: net.conv1.kernel.shape[0]),
    ],
)
def test_a_new_network_has_the_sizes_that_the_flags_give(few, flag, read):
    name, value = flag.split("=")
    assert read(small_network()) != int(value)
    network = Command(*FAST, f"--{flag}").network()
    if name != "kernel_size":  # with which the positions change
        assert read(network) == int(value)
    assert getattr(network.config, name) == int(value)


def test_the_default_network_is_that_of_the_paper(few):
    for words, parameters in ([], 8_215_568), (["--multi_MNIST"], 11_361_808):
        assert sum(count for *_, count in Command(*words).config.sizes()) == parameters
    assert Command("--network=cnn").config == CNNConfig((28, 28, 1), 10)
    pairs = Command("--network=cnn", "--multi_MNIST").config
    assert pairs == CNNConfig((36, 36, 1), 10, architecture="multi", n_digits=2)


def test_initialization_says_how_the_first_weights_are_drawn(few):
    glorot, authors = (
        Command(*FAST, "--n_conv=64", "--n_primary=32", f"--initialization={name}").network()
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
        Command(*FAST, f"--seed={seed}").network().get_weights() for seed in (3, 3, 4)
    )
    assert len(first) == len(other) > 5
    for one, again, different in zip(first, same, other, strict=True):
        np.testing.assert_array_equal(one, again)
        assert not one.any() or (one != different).mean() > 0.9  # the biases are 0


# ---------------------------------------------------------------- loading weights


@pytest.fixture(scope="module")
def network():
    """The network of the checkpoints, never trained."""
    return small_network()


@pytest.fixture
def saved(tmp_path, few, network, monkeypatch):
    """The working folder, with a checkpoint of the default run."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(CHECKPOINT, network, data=Command().data.digest(0, 0))
    return tmp_path


@pytest.fixture
def no_data(monkeypatch):
    """Make every attempt to read a data set fail."""

    def fail(name, folder, *_):
        raise DataFileError(folder, "no such file", name)

    monkeypatch.setattr(datasets, "load_dataset", fail)


def test_loading_rebuilds_the_network_of_the_weights_and_says_where_they_come_from(
    saved, network, capsys
):
    weights = Command("--test", "--seed=9").load()
    assert weights.network.config == network.config
    assert_same(weights.network.get_weights(), network.get_weights())
    assert weights.metadata["step"] == 15 and weights.folder == CHECKPOINT
    assert capsys.readouterr().out == "Weights of step 15 from checkpoint/mnist\n"


def test_a_network_of_other_images_and_classes_is_rebuilt_without_its_data_set(
    tmp_path, no_data, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    odd = CapsNet((20, 24, 3), 4, 5, 1, 3, 6, 2, 5, decoder_units=(7, 6), variant="authors")
    description = {KEY: {"ink_style": None, "ground": "light"}}
    save_checkpoint(CHECKPOINT, odd, description, class_names=list("abcd"))
    command = Command("--predict=x")
    weights = command.load()
    assert weights.network.config == odd.config
    assert_same(weights.network.get_weights(), odd.get_weights())
    assert weights.class_names == tuple("abcd") and weights.digits_per_example == 1
    assert appearance_of(command.flags, weights) == Appearance(None, "light")
    assert capsys.readouterr().out == "Weights of step 15 from checkpoint/mnist\n"
    with pytest.raises(NoCheckpoint, match="elsewhere"):
        Command("--predict=x", "--checkpoint_dir=elsewhere").load()


@pytest.mark.parametrize("mode", ["test", "reconstruction_test", "tweak_test"])
def test_other_modes_read_the_data_set(saved, no_data, mode):
    refusal = run(saved, f"--{mode}", "--predict=" + str(ROOT / "assets/digits/1.png"))
    assert_refused(refusal, 1, "no such file")


SETTINGS = {
    "n_conv": (8, 9),
    "n_primary": (2, 3),
    "primary_dim": (8, 7),
    "digit_dim": (4, 5),
    "routing_iterations": (3, 2),
    "kernel_size": (9, 8),
    "variant": ("paper", "authors"),
    "none_of_the_above": (False, True),
    "network": ("capsnet", "cnn"),
}


def test_a_flag_that_contradicts_the_weights_is_refused_with_both_values(saved):
    for name, (there, here) in SETTINGS.items():
        refusal = run(saved, "--test", f"--{name}={here}", *QUICK)
        assert_refused(
            refusal, 1, f"--{name}={here} is given", str(CHECKPOINT), "leave the flag out"
        )
        assert f" {name}={there};" in refusal.err
    refusal = run(saved, "--export=new", "--architecture=mnist", *QUICK)
    assert_refused(refusal, 1, "--architecture=mnist is given", "are of network=capsnet;")
    assert files(saved) == {
        f"{CHECKPOINT}/{name}"
        for name in ("checkpoint", "ckpt-15.index", "ckpt-15.data-00000-of-00001")
    }


def test_flags_that_agree_with_the_weights_are_accepted_and_those_of_a_recipe_do_not_count(
    saved, network
):
    agreeing = [f"--{name}={there}" for name, (there, _) in SETTINGS.items()]
    for words in agreeing, ["--recipe=authors"], ["--recipe=authors", "--variant=paper"]:
        assert Command("--test", *words).load().network.config == network.config


def test_settings_and_network_of_a_cnn_are_compared_too(saved):
    cnn = CNN((4, 4, 1), 10, "affine")
    save_checkpoint(CHECKPOINT, cnn)
    assert Command("--test", "--network=cnn", "--architecture=affine").load().network.config == (
        cnn.config
    )
    for word, words in {
        "--architecture=multi": ["have architecture=affine;"],
        "--n_conv=8": ["--n_conv=8 is given", "are of network=cnn;"],
        "--network=capsnet": ["--network=capsnet is given", "are of network=cnn;"],
    }.items():
        assert_refused(run(saved, "--test", word, *QUICK), 1, *words, "leave the flag out")


def test_a_network_that_this_version_does_not_know_is_refused(saved, network):
    shape = network.config.describe()
    for wrong in {"network": "transformer"}, {"n_heads": 3}, {"variant": "mine"}:
        strange = weights_of(network).metadata | {"shape": shape | wrong, KEY: None}
        del strange[KEY]
        folder = Path(f"export_{next(iter(wrong))}")
        folder.mkdir()
        np.savez(folder / "weights.npz", facts=json.dumps(strange))
        with pytest.raises(UserError, match="does not know.*expected one of capsnet, cnn"):
            load_network(folder)


def test_weights_of_other_images_are_announced(saved, network, capsys):
    command = Command("--test")
    check_data(command.load(), command.data)
    assert "that differ" not in capsys.readouterr().out
    digest = command.data.digest(7, 0)
    check_data(weights_of(network, data=digest), command.data)
    assert "trained on images that differ" in capsys.readouterr().out
    # Of the first seven, and these are there.
    check_data(weights_of(network, data=digest, train_size=7), command.data)
    assert "that differ" not in capsys.readouterr().out


def test_older_weights_take_the_look_of_the_data_set_if_it_is_there(saved, network, few, capsys):
    command = Command("--predict=x")
    weights = command.load()
    expected = measure_appearance(command.data.train)
    assert appearance_of(command.flags, weights) == expected and expected.ink_style is not None
    weights = weights_of(network, data=command.data.digest(7, 0))
    assert "that differ" not in capsys.readouterr().out
    assert appearance_of(command.flags, weights) == expected
    assert "images that differ" in capsys.readouterr().out


def test_older_weights_without_their_data_set_say_that_files_are_only_fitted(
    network, no_data, capsys
):
    flags = Command("--predict=x").flags
    weights = weights_of(network, dataset="mnist")
    assert weights.class_names == tuple("0123456789")
    assert appearance_of(flags, weights) == PLAIN
    out = capsys.readouterr().out
    assert "do not say how their training images look" in out and "resized whole" in out
    assert weights_of(network, dataset="fashion_mnist").class_names[9] == "Ankle boot"
    # They may not name their data set either.
    assert weights_of(network).class_names == tuple("0123456789")


def test_weights_for_other_classes_or_images_are_refused(saved, network):
    data = Command("--test").data
    names = list("abcdefghij")
    with pytest.raises(UserError, match=r"trained on other classes: \['a', 'b'.*'0', '1'.*--datas"):
        check_data(weights_of(network, class_names=names), data)
    check_data(weights_of(network, class_names=list("0123456789")), data)
    save_checkpoint(CHECKPOINT, small_network((20, 20, 1), 10))
    refusal = run(saved, "--test", *QUICK)
    assert_refused(
        refusal, 1, r"image_shape is [20, 20, 1] there and [28, 28, 1] here", "--dataset"
    )


@pytest.mark.parametrize("folder", ["checkpoint", "val_checkpoint"])
def test_the_best_weights_are_loaded_only_with_validation_check(saved, network, folder, capsys):
    words = ["--validation_check"] if folder == "val_checkpoint" else []
    other = varied_network()
    save_checkpoint(Path("val_checkpoint/mnist"), other, step=13)
    weights = Command("--predict=x", *words).load()
    expected = other if words else network
    np.testing.assert_array_equal(weights.network.conv1.kernel, expected.conv1.kernel)
    assert f"from {folder}/mnist" in capsys.readouterr().out


@pytest.mark.parametrize("mode", main.MODES[1:])
def test_a_folder_of_events_is_claimed_by_the_modes_that_use_it(saved, mode):
    value = {"export": "=new", "predict": "=x"}.get(mode, "")
    Command(f"--{mode}{value}").load()
    claim = Path("logs/mnist/run")
    assert claim.exists() is (mode != "predict")
    if claim.exists():
        assert (claim.parent / claim.read_text().strip()).resolve() == CHECKPOINT.resolve()
        shutil.copytree("checkpoint", "elsewhere")
        refusal = run(saved, f"--{mode}{value}", "--checkpoint_dir=elsewhere", *QUICK)
        assert_refused(refusal, 1, "logs/mnist belongs to the run in", "--logdir")


# ---------------------------------------------------------------- exported weights


def test_pretrained_weights_are_sought_by_the_name_of_the_data_set(
    tmp_path, few, network, monkeypatch
):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    refusal = run(tmp_path, "--test", "--pretrained", *QUICK)
    assert_refused(refusal, 1, "for mnist; available: none", "train first")
    save_exported(tmp_path / "pretrained/mnist", network)
    save_exported(tmp_path / "pretrained/own", network)
    np.savez("own.npz", 0)
    for words, name in ([], "mnist"), (["--dataset=./own.npz"], "own"):
        weights = Command("--pretrained", "--predict=x", *words).load()
        assert weights.folder == tmp_path / "pretrained" / name
    assert not Path("logs").exists()
    refusal = run(tmp_path, "--test", "--pretrained", "--multi_MNIST", *QUICK)
    assert_refused(refusal, 1, "for multi_mnist; available: mnist, own")
    refusal = run(tmp_path, "--test", "--pretrained", "--n_conv=9", *QUICK)
    assert_refused(refusal, 1, "--n_conv=9 is given", "pretrained/mnist have n_conv=8")


def test_missing_other_and_damaged_weights_are_told_apart(tmp_path, network):
    with pytest.raises(NoPretrainedWeights, match="for nothing; available: mnist"):
        save_exported(tmp_path / "mnist", network)
        read_exported(tmp_path / "nothing")
    with pytest.raises(UserError, match="no weights.npz in .*nothing, expected a folder that"):
        load_network(tmp_path / "nothing")
    path = tmp_path / "mnist/weights.npz"
    content = path.read_bytes()
    changed = content[:5000] + b"xxxx" + content[5004:]
    for damaged in (b"", content[:1000], content[:-50], changed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="weights.npz is damaged"):
            load_network(tmp_path / "mnist")
    facts = json.dumps({"shape": network.config.describe(), "training": RUN})
    values = {v.path: v.numpy() for v in network.variables}
    values["conv1/kernel"] = values["conv1/kernel"][:4]  # of another shape
    other, before = small_network(), small_network().get_weights()
    other.set_weights(before)
    for content in ({"facts": facts}, values, {"facts": facts, **values}):
        np.savez(path, **content)
        with pytest.raises(UserError, match="weights.npz is damaged"):
            assign(other.variables, read_exported(tmp_path / "mnist")[1], path.parent)
        assert_same(other.get_weights(), before)


def test_exported_weights_may_be_named_from_the_folder_of_the_program(
    tmp_path, network, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_exported(tmp_path / "own", network)
    assert find_exported("pretrained/mnist") == ROOT / "pretrained/mnist"
    assert find_exported(tmp_path / "own") == tmp_path / "own"


def test_an_exported_network_is_rebuilt_with_its_weights(tmp_path, network):
    for kind in network, CNN((4, 4, 3), 3, "affine"):
        values = save_exported(tmp_path / kind.config.network, kind)
        loaded = load_network(tmp_path / kind.config.network, conv="dft")
        assert loaded.config == kind.config and loaded.conv == "dft"
        assert {v.path for v in loaded.variables} == values.keys()
        assert_same(loaded.variables, [values[v.path] for v in loaded.variables])


@pytest.mark.parametrize(
    ("name", "size", "most_bytes", "least_accuracy"),
    [("mnist", 28, 16e6, 0.99), ("multi_mnist", 36, 25e6, 0.8)],
)
def test_the_weights_that_come_with_the_program_are_those_of_the_default_network(
    name, size, most_bytes, least_accuracy
):
    folder, overlap = ROOT / "pretrained" / name, name == "multi_mnist"
    assert (folder / "weights.npz").stat().st_size < most_bytes
    metadata, network = read_exported(folder)[0], load_network(folder, conv="dft")
    assert network.config == type(network.config)((size, size, 1), 10)
    training = metadata["training"]
    assert training["multi_MNIST"] == overlap
    assert training["data_deformation"] == (not overlap)
    assert training["train_size"] == 0
    mnist = load_all("mnist", ROOT / "data")
    unseen = Examples(mnist.x_test[:200], mnist.y_test[:200])
    if overlap:
        unseen = unseen._replace(
            padding=config.MULTI_PADDING, max_shift=config.MULTI_SHIFT, overlap=True
        )
    evaluation = Evaluator(network, False).evaluate(unseen, unseen.evaluation_plan())
    assert evaluation.accuracy > least_accuracy
    assert f"trained for {metadata['step']:,} steps" in (folder / "README.md").read_text()


# ---------------------------------------------------------------- weights of an earlier version


@pytest.fixture(scope="module")
def expected():
    """What the earlier version computed."""
    with np.load(OLD_RUN / "expected.npz") as file:
        return dict(file)


def test_a_run_of_an_earlier_version_is_examined_without_a_flag_of_its_network(
    tmp_path, few, expected, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD_RUN / "checkpoint", "checkpoint")
    (network, metadata, _) = Command("--test").load()
    outputs = network(expected["images"] / np.float32(255))
    for value, name in zip(outputs, ("lengths", "capsules"), strict=True):
        np.testing.assert_allclose(value, expected[name], atol=1e-5)
    for number, image in enumerate(expected["images"]):
        Image.fromarray(image[..., 0]).save(f"{number}.png")
    result = run(tmp_path, "--predict=*.png", *QUICK)
    assert (result.code, result.err) == (0, "")
    first = re.findall(r"^\d\.png \(unchanged\): (\d): (0\.\d+)", result.out, re.MULTILINE)
    assert [int(name) for name, _ in first] == expected["lengths"].argmax(axis=1).tolist()
    shown = [float(length) for _, length in first]
    np.testing.assert_allclose(shown, expected["lengths"].max(axis=1), atol=6e-4)
    assert_refused(run(tmp_path, "--test", "--n_conv=8", *QUICK), 1, "have n_conv=4;")


def test_a_run_of_an_earlier_version_differs_from_none_of_this_one_with_its_flags(few, monkeypatch):
    monkeypatch.chdir(OLD_RUN)
    metadata = Command("--predict=x").load().metadata
    sizes = ["--n_conv=4", "--n_primary=3", "--primary_dim=2", "--digit_dim=3"]
    words = ["--train", "--validation_check", "--train_size=96", "--batch_size=16", "--seed=3"]
    trainer = Command(*QUICK, *sizes, *words, "--learning_rate=0.01").trainer()
    assert trainer.metadata["training"] == metadata["training"]
    assert differences(metadata["shape"], trainer.metadata["shape"]) == (
        "decoder_units is [2] there and [512, 1024] here"  # which no flag gives
    )


def test_weights_exported_by_an_earlier_version_are_loaded(expected):
    lengths, capsules = load_network(OLD_RUN / "exported")(expected["images"] / np.float32(255))
    np.testing.assert_allclose(lengths, expected["lengths_float16"], atol=1e-5)
    np.testing.assert_allclose(capsules, expected["capsules_float16"], atol=1e-5)


# ---------------------------------------------------------------- initial weights

EARLIER = ("cat", "dog", "red fox")


def earlier_weights(folder, names=EARLIER, variant="paper", shape=(10, 12, 3)):
    """Export a network of three classes with weights that differ, and return them."""
    network = CapsNet(shape, 3, 4, 2, 3, 5, kernel_size=3, decoder_units=(6,), variant=variant)
    stream = np.random.default_rng(5)
    for variable in network.variables:
        variable.assign(stream.normal(0, 1, variable.shape))
    return save_exported(folder, network, class_names=list(names) if names else None)


def new_network(n_classes=4, shape=(10, 12, 3), variant="paper", kernel_size=3):
    keras.utils.set_random_seed(1)
    return CapsNet(
        shape, n_classes, 4, 2, 3, 5, kernel_size=kernel_size, decoder_units=(6,), variant=variant
    )


def by_path(network):
    return {v.path: v.numpy() for v in network.variables}


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_with_other_classes_convolutions_and_the_capsules_of_shared_names_are_kept(
    tmp_path, variant
):
    earlier = earlier_weights(tmp_path / "a", variant=variant)
    network = new_network(variant=variant)
    first = by_path(network)
    metadata, kept = start_with(network, ("red fox", "owl", "cat", "eel"), tmp_path / "a")
    assert metadata["training"]["class_names"] == list(EARLIER)
    assert kept == (
        "conv1, primary_capsules are kept, and the capsules of red fox (2 → 0), cat (0 → 2); the "
        "rest starts with new weights"
    )
    seen = set()
    for path, value in by_path(network).items():
        layer = path.split("/")[0]
        seen.add(path)
        if layer in ("conv1", "primary_capsules"):
            np.testing.assert_array_equal(value, earlier[path])
        elif layer == "digit_capsules":
            np.testing.assert_array_equal(value[[0, 2]], earlier[path][[2, 0]])
            np.testing.assert_array_equal(value[[1, 3]], first[path][[1, 3]])
        else:
            assert layer == "decoder"
            np.testing.assert_array_equal(value, first[path])
    assert ("digit_capsules/bias" in seen) is (variant == "authors")


def test_the_same_classes_in_another_order_have_their_capsules_at_their_new_places(tmp_path):
    earlier = earlier_weights(tmp_path / "a")
    network = new_network(3)
    _, kept = start_with(network, ("dog", "cat", "red fox"), tmp_path / "a")
    assert "dog (1 → 0), cat (0 → 1), red fox (2 → 2)" in kept
    weights = earlier["digit_capsules/W"]
    np.testing.assert_array_equal(network.digits.W, weights[[1, 0, 2]])


@pytest.mark.parametrize("names", [EARLIER, None])
def test_with_equal_classes_all_weights_are_kept(tmp_path, names):
    earlier = earlier_weights(tmp_path / "a", names)
    network = new_network(3)
    _, kept = start_with(network, EARLIER, tmp_path / "a")
    assert kept == "all of them are kept"
    for path, value in by_path(network).items():
        np.testing.assert_array_equal(value, earlier[path])


@pytest.mark.parametrize("names", [EARLIER, ("bee", "ant"), ("a", "b", "c")])
def test_of_images_of_another_size_or_of_other_names_only_the_convolutions_are_kept(
    tmp_path, names
):
    earlier = earlier_weights(tmp_path / "a")
    network = new_network(len(names), (14, 12, 3) if names == EARLIER else (10, 12, 3))
    first = by_path(network)
    _, kept = start_with(network, names, tmp_path / "a")
    assert kept == "conv1, primary_capsules are kept; the rest starts with new weights"
    for path, value in by_path(network).items():
        convolution = path.startswith(("conv1", "primary_capsules"))
        np.testing.assert_array_equal(value, (earlier if convolution else first)[path])


@pytest.mark.parametrize(
    "network, words",
    [
        (lambda: new_network(4, (10, 12, 1)), "image_shape is"),
        (lambda: new_network(4, kernel_size=4), "kernel_size is 3 there and 4 here"),
        (lambda: new_network(4, variant="authors"), "variant is paper there and authors here"),
        (lambda: CNN((12, 12, 3), 3, "affine"), "network is capsnet there and cnn here"),
    ],
)
def test_initial_weights_of_other_layers_are_refused_and_change_nothing(tmp_path, network, words):
    earlier_weights(tmp_path / "a")
    network = network()
    before = network.get_weights()
    names = EARLIER[: network.config.n_classes] + ("owl",) * (network.config.n_classes - 3)
    with pytest.raises(PretrainedMismatch, match=words):
        start_with(network, names, tmp_path / "a")
    assert_same(network.get_weights(), before)


def test_of_a_cnn_with_other_classes_the_convolutions_are_kept(tmp_path):
    earlier = save_exported(tmp_path / "a", CNN((4, 4, 3), 3, "affine"), class_names=list("abc"))
    network = CNN((8, 4, 3), 2, "affine")
    _, kept = start_with(network, ("a", "b"), tmp_path / "a")
    assert kept == "conv1, conv2, conv3 are kept; the rest starts with new weights"
    for layer in network.convolutions:
        for variable in layer.variables:
            np.testing.assert_array_equal(variable, earlier[variable.path])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of exported weights, which all fit the images of the tests."""
    folder = tmp_path_factory.mktemp("exported") / "taken/along"
    save_exported(folder, varied_network(), class_names=list("0123456789"))
    return folder


def test_a_training_run_starts_with_exported_weights(exported, few, tmp_path):
    words = ["--train", f"--initial_weights={exported}", *SMALL, "--learning_rate=1e-9"]
    result = run(tmp_path, *words)
    assert (result.code, result.err) == (0, "")
    assert f"The initial weights are those in {exported}: all of them are kept.\n" in result.out
    assert "--initial_weights" not in result.out.splitlines()[-1]  # the command to type next
    network = small_network()
    metadata = load_weights(network, tmp_path / "checkpoint/mnist", print)
    halves = [value.astype(np.float16) for value in varied_network().get_weights()]
    for value, half in zip(network.get_weights(), halves, strict=True):
        np.testing.assert_allclose(value, half, atol=1e-5)
    digest = fingerprint(*(half.astype(np.float32) for half in halves))
    assert metadata["training"]["initial_weights"] == digest
    assert metadata["training"]["initialization"] is None  # nothing of it was used
    assert "This run is finished" in run(tmp_path, *words).out


def test_a_run_that_began_with_exported_weights_resumes_with_them_only(exported, few):
    with_weights = Command("--train", f"--initial_weights={exported}", *SMALL).trainer().metadata
    again = Command("--train", f"--initial_weights={exported}", *SMALL).trainer().metadata
    without = Command("--train", *SMALL).trainer().metadata
    assert differences(with_weights["training"], again["training"]) == ""
    different = differences(with_weights["training"], without["training"])
    assert "initialization is None there and glorot here" in different
    assert "the initial weights differ" in different


def test_initial_weights_that_do_not_fit_are_refused_before_anything_is_written(
    exported, few, tmp_path
):
    refusal = run(tmp_path, "--train", "--initial_weights=nowhere", *SMALL)
    assert_refused(refusal, 1, "no weights.npz in nowhere, expected a folder that --export wrote")
    refusal = run(tmp_path, "--train", f"--initial_weights={exported}", *SMALL, "--n_conv=9")
    assert_refused(refusal, 1, "n_conv is 8 there and 9 here; leave these flags out, or train")
    assert files(tmp_path) == set()


def reports_of(tmp_path, command, **training):
    """What is reported if a command starts with weights of these settings."""
    save_exported(tmp_path / "seen", small_network(), **training)
    command.flags.initial_weights = str(tmp_path / "seen")
    reports = []
    command.trainer(reports.append)
    assert reports[0].startswith("The initial weights are those in ")
    return reports[1:]


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({}, ["repeat"]),
        ({"validation_check": False}, ["held out now"]),
        ({"seed": 1}, ["held out now"]),
        ({"initial_weights": "abc"}, ["held out now", "repeat"]),  # which may have seen all
        ({"data": "others"}, []),
    ],
)
def test_what_the_initial_weights_saw_is_reported(few, tmp_path, earlier, expected):
    command = Command("--train", *SMALL, "--validation_check")
    training = {"data": command.data.digest(300, 0), "train_size": 300, "seed": 0}
    reports = reports_of(tmp_path, command, **training | {"validation_check": True} | earlier)
    assert len(reports) == len(expected)
    assert all(text in report for text, report in zip(expected, reports, strict=True))


def test_another_share_of_the_images_holds_out_others(few, tmp_path):
    command = Command("--train", *SMALL, "--train_size=60", "--validation_check")
    training = {"data": command.data.digest(0, 0), "train_size": 0, "validation_check": True}
    (report,) = reports_of(tmp_path, command, **training)
    assert command.data.train_size == 60 and "held out now" in report


def test_initial_weights_that_saw_test_images_are_refused(few, tmp_path):
    command = Command("--train", *SMALL)
    command.data = command.data._replace(dataset=few._replace(held_out_seed=1))
    training = {"data": command.data.digest(0, 0), "train_size": 0, "held_out_seed": 0}
    with pytest.raises(UserError, match="seed 1 draws were trained on; give --seed=0"):
        reports_of(tmp_path, command, dataset=few.name, **training)
    check_unseen(tmp_path, {"held_out_seed": 0, "dataset": "other"}, command.data)


# ---------------------------------------------------------------- parts that are left as they are


FREEZE = ["--freeze=conv1,primary", *SMALL, "--train_size=40"]  # 2 steps an epoch


@pytest.fixture(scope="module")
def frozen(few, tmp_path_factory):
    """A folder with a run whose convolutions are left as they are."""
    folder = tmp_path_factory.mktemp("frozen")
    result = run(folder, "--train", *FREEZE)
    assert result.code == 0, result
    assert "--freeze" not in result.out.splitlines()[-1]  # the command to type next
    return folder


def assert_only_the_others_changed(network):
    first = by_path(Command(*FREEZE, "--train").network())
    kept = ("conv1/", "primary_capsules/")
    assert len(first) == 11
    for path, value in by_path(network).items():
        assert (value == first[path]).all() == path.startswith(kept), path


def test_frozen_parts_keep_their_bits_while_the_others_are_trained(frozen, monkeypatch):
    monkeypatch.chdir(frozen)
    weights = Command("--test").load()
    assert weights.training["freeze"] == ["conv1", "primary"] and weights.metadata["step"] == 2
    assert_only_the_others_changed(weights.network)


def test_a_run_with_frozen_parts_is_tested_and_resumed(frozen, tmp_path, monkeypatch):
    shutil.copytree(frozen, tmp_path, dirs_exist_ok=True)
    result = run(tmp_path, "--test", *QUICK)
    assert (result.code, result.err) == (0, "") and "of 200 wrong" in result.out
    result = run(tmp_path, "--train", *FREEZE, "--epoch=2")
    assert (result.code, result.err) == (0, "") and "Resuming from step 2 " in result.out
    monkeypatch.chdir(tmp_path)
    weights = Command("--test").load()
    assert weights.metadata["step"] == 4
    assert_only_the_others_changed(weights.network)


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--freeze=conv1,conv2"], "the network has no 'conv2', expected some of conv1, primary, "),
        (["--freeze=conv1,"], "the network has no '', expected some of"),
        (["--freeze=decoder,digits,primary,conv1"], "nothing is left to train, expected some of"),
        (["--freeze=conv1", "--notrain", "--test"], "needs --train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_refused(few, tmp_path, words, problem):
    assert_refused(run(tmp_path, "--train", *SMALL, *words), 2, "--freeze", problem)
    assert files(tmp_path) == set()


def test_the_layers_of_a_cnn_are_frozen_by_their_names():
    command = Command("--train", "--network=cnn", "--freeze=conv2,dense1")
    network = build_network(
        CNNConfig((4, 4, 3), 2, "affine"), 0, command.devices, freeze=["conv2", "dense1"]
    )
    trained = {v.path.split("/")[0] for v in network.trainable_variables}
    assert trained == {"conv1", "conv3", "dense2"}
