"""Checkpoints: what is saved and kept, and what damage, kills and other networks do to them."""

import json
import os
import random
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from engine import events, folders_in, network, same, state, trainer_in

from capsnet_core.config import TrainingConfig
from capsnet_core.errors import DamagedCheckpoints, NetworkMismatch, NoCheckpoint, UserError
from capsnet_core.metadata import complete, differences
from inputs import datasets
from inputs.pipeline import Examples, split_validation
from model import CapsNet
from training.checkpoints import (
    DAMAGE,
    Checkpoints,
    RunState,
    load_weights,
    newest_intact,
    newest_metadata,
    read_metadata,
    saved_steps,
)
from training.trainer import Device, Run, Trainer

ROOT = Path(__file__).parent.parent
OLD_RUN = ROOT / "tests" / "fixtures" / "old_run"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def make_optimizer(net):
    optimizer = keras.optimizers.Adam(name="adam")
    optimizer.build(net.trainable_variables)
    return optimizer


def make_checkpoints(folder, net=None, keep=2):
    net = net or network()
    return Checkpoints(folder, net, make_optimizer(net), 4, keep)


def metadata_of(net):
    return complete({"shape": net.config.describe(), "training": {"averaging": 0.0, "seed": 3}})


def listed(folder):
    """The steps in TensorFlow's list of checkpoints, as TensorFlow reads it."""
    checkpoints = tf.train.get_checkpoint_state(str(folder)).all_model_checkpoint_paths
    assert tf.train.latest_checkpoint(str(folder)) == checkpoints[-1]
    return [int(path.rsplit("-", 1)[1]) for path in checkpoints]


# --- Saving and pruning ---------------------------------------------------------------------------


def test_a_checkpoint_has_each_variable_under_its_path_and_the_state_of_the_run(tmp_path):
    net = network()
    optimizer = make_optimizer(net)
    checkpoints = Checkpoints(tmp_path, net, optimizer, 4)
    metadata = {"shape": {}, "training": {}, "note": "é"}
    checkpoints.save(RunState(7, np.arange(4.0), 0.25), metadata)
    reader = tf.train.load_checkpoint(str(tmp_path / "ckpt-7"))
    expected = {"sums": np.arange(4.0), "best": np.float64(0.25), "step": np.int64(7)}
    for group, variables in ("weights", net.variables), ("optimizer", optimizer.variables):
        for v in variables:
            expected[f"{group}/{v.path.replace('/', '.S')}"] = v.numpy()
    keys = {key.removesuffix(VALUE) for key in reader.get_variable_to_shape_map()}
    assert keys == {*expected, "facts", "save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH"}
    for key, value in expected.items():
        saved = reader.get_tensor(key + VALUE)
        assert saved.dtype == value.dtype
        np.testing.assert_array_equal(saved, value)
    assert json.loads(reader.get_tensor("facts" + VALUE)) == metadata
    assert read_metadata(tmp_path, 7) == complete(metadata)


def test_restoring_brings_back_variables_and_state_into_another_network(tmp_path):
    net = network()
    saved = RunState(7, np.arange(4.0), 0.25)
    make_checkpoints(tmp_path, net).save(saved, metadata_of(net))
    other = network(seed=9)
    restored = make_checkpoints(tmp_path, other).restore(7)
    assert (restored.step, restored.best_loss) == (7, 0.25)
    np.testing.assert_array_equal(restored.sums, saved.sums)
    assert same(other.get_weights(), net.get_weights())


@pytest.mark.parametrize(
    "keep, kept", [(1, [[1], [5], [10], [12]]), (2, [[1], [5, 1], [10, 5], [12, 10]])]
)
def test_only_the_newest_checkpoints_are_kept_and_listed(tmp_path, keep, kept):
    folder = tmp_path / "new" / "folder"
    checkpoints = make_checkpoints(folder, keep=keep)
    for step, steps in zip((1, 5, 10, 12), kept, strict=True):
        checkpoints.save(RunState(step, np.zeros(4)), {})
        assert saved_steps(folder) == steps and listed(folder) == steps[::-1]
        names = {f"ckpt-{s}.{part}" for s in steps for part in ("index", "data-00000-of-00001")}
        assert {path.name for path in folder.iterdir()} == names | {"checkpoint"}


def test_what_was_just_saved_is_kept_even_if_an_earlier_run_left_a_later_step(tmp_path):
    checkpoints = make_checkpoints(tmp_path, keep=1)
    for step in (12, 6):
        checkpoints.save(RunState(step, np.zeros(4)), {})
    assert saved_steps(tmp_path) == listed(tmp_path) == [6]


def test_a_step_that_is_saved_again_replaces_the_one_before(tmp_path):
    checkpoints = make_checkpoints(tmp_path)
    for best in (0.5, 0.25):
        checkpoints.save(RunState(6, np.zeros(4), best), {})
    assert saved_steps(tmp_path) == listed(tmp_path) == [6]
    assert checkpoints.restore(6).best_loss == 0.25


@pytest.mark.parametrize("name", ["a[b]", "a]b", "a*b", "a?b", "ä b"])
def test_folders_may_have_any_characters_in_their_names(tmp_path, name):
    folder, net = tmp_path / name / "checkpoint", network()
    make_checkpoints(folder, net).save(RunState(6, np.zeros(4)), metadata_of(net))
    other = network(seed=5)
    assert load_weights(other, folder, print) == metadata_of(net)
    assert same(other.get_weights(), net.get_weights())
    checkpoints = make_checkpoints(folder)
    assert checkpoints.newest_intact_step(print) == 6 == checkpoints.restore(6).step
    checkpoints.prepare(6)
    assert saved_steps(folder) == [6]


@pytest.mark.parametrize("name", ["a[b", "*?\\{a,b}"])
def test_a_run_in_a_folder_whose_name_could_be_a_pattern_is_resumed(tmp_path, name):
    for epochs in (1, 7 / 6):
        trainer = trainer_in(tmp_path / name)
        trainer.fit(epochs, 500)
    assert trainer.resumed_step == 6
    assert saved_steps(tmp_path / name / "checkpoint") == [7, 6]
    assert load_weights(network(), tmp_path / name / "best", print)["step"] == 6


def test_a_working_folder_may_have_any_name(tmp_path, monkeypatch):
    """TensorFlow takes no path with bytes that are not UTF-8, but relative ones are enough."""
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    net = network()
    make_checkpoints(Path("run"), net).save(RunState(6, np.zeros(4)), metadata_of(net))
    assert (folder / "run" / "checkpoint").read_text().count('"ckpt-6"') == 2
    assert load_weights(network(seed=5), Path("run"), print) == metadata_of(net)


def test_a_checkpoint_that_cannot_be_written_is_a_user_error_and_the_others_stay(
    run_copy, monkeypatch
):
    folder = run_copy / "checkpoint"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trainer = trainer_in(run_copy)
    full = tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    def write(self, path):
        raise full

    monkeypatch.setattr(tf.train.Checkpoint, "write", write)
    with pytest.raises(UserError, match="cannot save to .*No space left.*intact") as caught:
        trainer.fit(3, 500)
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Damage ---------------------------------------------------------------------------------------


def saved_weights(folder, step, averaged=False):
    """Return the kernel of the hidden layer in a checkpoint, or its running average."""
    reader = tf.train.load_checkpoint(str(folder / f"ckpt-{step}"))
    path = "optimizer/adam.Shidden_kernel_average" if averaged else "weights/hidden.Skernel"
    return reader.get_tensor(path + VALUE)


def truncate(data, index, place):
    os.truncate(data, place + 4)


def flip(data, index, place):
    content = bytearray(data.read_bytes())
    content[place + 2] ^= 1
    data.write_bytes(content)


def flip_in_index(data, index, place):
    flip(index, None, index.stat().st_size // 2)


def empty(data, index, place):
    data.write_bytes(b"")


def empty_index(data, index, place):
    index.write_bytes(b"")


def lose_data(data, index, place):
    data.unlink()


def lose_index(data, index, place):
    index.unlink()


DAMAGES = [truncate, flip, flip_in_index, empty, empty_index, lose_data, lose_index]


def damage_checkpoint(folder, step, damage):
    data = folder / f"ckpt-{step}.data-00000-of-00001"
    place = data.read_bytes().index(saved_weights(folder, step).tobytes())
    damage(data, folder / f"ckpt-{step}.index", place)


@pytest.mark.parametrize("damage", DAMAGES)
def test_instead_of_a_damaged_checkpoint_the_one_before_is_used_and_reported(run_copy, damage):
    folder, net, lines = run_copy / "checkpoint", network(seed=4), []
    expected = saved_weights(folder, 10)
    assert not np.array_equal(expected, saved_weights(folder, 12))
    damage_checkpoint(folder, 12, damage)
    assert load_weights(net, folder, lines.append)["step"] == 10
    trainer = trainer_in(run_copy)
    settings = trainer.metadata["shape"] | trainer.metadata["training"]
    _, different, restored = trainer.checkpoints.restore_newest(settings, lines.append)
    assert (different, restored.step) == ("", 10)
    np.testing.assert_array_equal(trainer.network.hidden.kernel.numpy(), expected)
    averages = saved_weights(folder, 10, averaged=True)
    np.testing.assert_array_equal(net.hidden.kernel.numpy(), averages)
    # Without its index it is what a kill while saving leaves: never finished, so not reported.
    report = [f"Checkpoint {folder}/ckpt-12 is damaged; trying the one before."]
    assert lines == ([] if damage is lose_index else 2 * report)


@pytest.mark.parametrize("damage", [empty_index, lose_index])
def test_the_newest_metadata_that_can_be_read_need_no_network(run_copy, tmp_path, damage):
    folder = run_copy / "checkpoint"
    assert newest_metadata(folder) == read_metadata(folder, 12)
    damage_checkpoint(folder, 12, damage)
    assert newest_metadata(folder) == read_metadata(folder, 10)
    assert newest_metadata(folder)["step"] == 10
    damage_checkpoint(folder, 10, empty_index)
    with pytest.raises(DamagedCheckpoints):
        newest_metadata(folder)
    with pytest.raises(NoCheckpoint):
        newest_metadata(tmp_path / "nothing")


@pytest.mark.parametrize("damage", [flip, lose_index])
def test_training_from_the_checkpoint_before_a_damaged_one_ends_as_if_nothing_had_happened(
    run_copy, damage, finished_run
):
    expected = events(run_copy / "logs")
    damage_checkpoint(run_copy / "checkpoint", 12, damage)
    trainer = trainer_in(run_copy)
    trainer.fit(2, save_steps=5)
    assert trainer.resumed_step == 10
    assert same(state(trainer), finished_run.state)
    assert events(run_copy / "logs") == expected
    lines = []
    load_weights(trainer.network, run_copy / "checkpoint", lines.append)
    assert not lines and saved_steps(run_copy / "checkpoint") == [12, 10]


def test_if_every_checkpoint_is_damaged_nothing_is_deleted_and_restart_archives_them(run_copy):
    folder = run_copy / "checkpoint"
    for step, damage in (10, flip), (12, truncate):
        damage_checkpoint(folder, step, damage)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DamagedCheckpoints) as caught:
        load_weights(network(), folder, lambda line: None)
    assert caught.value.folder == folder
    with pytest.raises(DamagedCheckpoints):
        trainer_in(run_copy).fit(2, 500)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert trainer_in(run_copy).fit(1 / 6, 500, restart=True)
    assert saved_steps(folder) == [1]
    assert saved_steps(run_copy / "checkpoint.1") == [12, 10]


def test_damaged_best_weights_are_reported_and_the_next_ones_take_their_place(run_copy):
    damage_checkpoint(run_copy / "best", 12, flip)
    lines = []
    validations = []
    trainer = trainer_in(run_copy, on_message=lines.append, on_test_end=validations.append)
    trainer.fit(3, 500)
    assert lines == [f"Checkpoint {run_copy}/best/ckpt-12 is damaged; trying the one before."]
    assert saved_steps(run_copy / "best") == [18] and validations[0].improved


def randomly_damaged(content, rng):
    """Return the bytes of a file with a fault at a random place."""
    content, place = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content += bytes(rng.randrange(1, 50))
    return bytes(content)


def test_whatever_is_damaged_reading_gives_the_saved_values_or_says_that_it_is_damaged(
    finished_run, tmp_path
):
    rng, trainer = random.Random(0), trainer_in(tmp_path)
    names = ("ckpt-12.index", "ckpt-12.data-00000-of-00001")
    whole = {name: (finished_run.folder / "checkpoint" / name).read_bytes() for name in names}
    checkpoints, outcomes = trainer.checkpoints, {True: 0, False: 0}
    checkpoints.folder.mkdir()
    metadata = read_metadata(finished_run.folder / "checkpoint", 12)
    for _ in range(80):
        for name, content in whole.items():
            (checkpoints.folder / name).write_bytes(content)
        name = rng.choice(names)
        (checkpoints.folder / name).write_bytes(randomly_damaged(whole[name], rng))
        try:
            assert read_metadata(checkpoints.folder, 12) == metadata
            checkpoints.restore(12)
            intact = True
        except DAMAGE:
            intact = False
        outcomes[intact] += 1
        if intact:
            assert same(state(trainer), finished_run.state)
    assert outcomes[True] > 5 and outcomes[False] > 40


def test_a_file_that_may_not_be_read_is_an_error_and_no_damage(run_copy, monkeypatch):
    opened = Path.open

    def refuse(self, *arguments):
        if self.name.startswith("ckpt-12."):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"ckpt-12\."):
        load_weights(network(), run_copy / "checkpoint", print)


# --- Kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, saved",
    [(b"garbage", True), (None, True), (b"\xff\xfe\x00\x80", False)],
)
def test_the_small_file_that_lists_the_checkpoints_may_be_lost_or_garbage(run_copy, content, saved):
    folder = run_copy / "checkpoint"
    (folder / "checkpoint").unlink()
    if content is not None:
        (folder / "checkpoint").write_bytes(content)
    if not saved:
        for step in (10, 12):
            damage_checkpoint(folder, step, lose_index)
    trainer = trainer_in(run_copy, validation=False)
    trainer.fit(13 / 6 if saved else 7 / 6, save_steps=20)
    assert trainer.resumed_step == (12 if saved else None)
    assert saved_steps(folder) == ([13, 12] if saved else [7, 6])
    assert listed(folder) == saved_steps(folder)[::-1]


def test_leftovers_of_a_killed_save_are_deleted_and_files_of_the_user_stay(run_copy):
    folder = run_copy / "checkpoint"
    (folder / "ckpt-99_temp").mkdir()
    (folder / "ckpt-99_temp" / "part-0").write_bytes(b"half")
    (folder / "ckpt-99.data-00000-of-00001").write_bytes(b"half")
    (folder / "checkpoint.tmp123").write_bytes(b"half")
    (folder / "ckpt-backup" / "deep").mkdir(parents=True)
    (folder / "ckpt-12-good.index").write_bytes(b"the user's")
    make_checkpoints(folder).prepare(12)
    names = {f"ckpt-{s}.{part}" for s in (10, 12) for part in ("index", "data-00000-of-00001")}
    own = {"checkpoint", "ckpt-backup", "ckpt-12-good.index"}
    assert {path.name for path in folder.iterdir()} == names | own
    make_checkpoints(folder).prepare(10)
    assert saved_steps(folder) == listed(folder) == [10]
    make_checkpoints(folder).prepare(None)
    assert {path.name for path in folder.iterdir()} == {"ckpt-backup", "ckpt-12-good.index"}


def test_a_kill_in_the_very_first_save_is_no_damage(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "ckpt-5_temp").mkdir(parents=True)
    (folder / "ckpt-5.index").write_bytes(b"half")
    lines = []
    trainer_in(tmp_path, on_message=lines.append).fit(1 / 6, 500)
    assert saved_steps(folder) == [1] and not lines


# --- Other networks -------------------------------------------------------------------------------


def test_a_checkpoint_of_another_architecture_is_refused_naming_what_differs(run_copy):
    net = network(units=5)
    with pytest.raises(NetworkMismatch) as caught:
        load_weights(net, run_copy / "checkpoint", print)
    assert caught.value.differences == "units is 4 there and 5 here"
    assert str(caught.value.place) == f"{run_copy}/checkpoint/ckpt-12"


def other_variables(change):
    """A network of the same settings whose variables are not those of the checkpoint."""
    net = network()
    if change == "renamed":
        net.pixels = keras.layers.Dense(64, name="picture")
    else:
        net.pixels = keras.layers.Dense(63, name="pixels")
    net.pixels.build((None, 4))
    return net


@pytest.mark.parametrize(
    "change, problem",
    [
        ("renamed", "weights/picture/kernel is missing there and of shape [4, 64] here"),
        ("reshaped", "weights/pixels/kernel is of shape [4, 64] there and of shape [4, 63] here"),
    ],
)
def test_a_renamed_or_reshaped_variable_is_no_damage_and_nothing_is_restored_or_deleted(
    run_copy, change, problem
):
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    lines, net = [], other_variables(change)
    weights = net.get_weights()
    with pytest.raises(NetworkMismatch) as caught:
        load_weights(net, run_copy / "checkpoint", lines.append)
    assert caught.value.differences == problem
    trainer = trainer_in(run_copy, net=net, on_message=lines.append)
    with pytest.raises(NetworkMismatch, match="ckpt-12 holds another network"):
        trainer.fit(3, 500)
    with pytest.raises(NetworkMismatch):
        trainer.best.newest_intact_step(lines.append)
    assert same(net.get_weights(), weights) and not lines
    assert {p: p.read_bytes() for p in before} == before


def test_another_number_of_sums_is_a_mismatch_too(run_copy):
    trainer = trainer_in(run_copy)
    checkpoints = Checkpoints(run_copy / "checkpoint", trainer.network, trainer.optimizer, 5)
    with pytest.raises(NetworkMismatch, match=r"sums is of shape \[4\] there and of shape \[5\]"):
        checkpoints.restore(12)


def test_a_checkpoint_of_another_program_is_a_mismatch_and_is_not_deleted(run_copy):
    folder = run_copy / "checkpoint"
    tf.train.Checkpoint(v=tf.Variable(1.0)).write(str(folder / "ckpt-99"))
    for attempt in (
        lambda: load_weights(network(), folder, print),
        lambda: trainer_in(run_copy).fit(3, 500),
    ):
        with pytest.raises(NetworkMismatch, match="ckpt-99 .*facts is missing there"):
            attempt()
    assert saved_steps(folder) == [99, 12, 10]


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NoCheckpoint) as caught:
            load_weights(network(), folder, print)
        assert caught.value.folder == folder
    assert newest_intact(tmp_path, lambda step: step, print) == (None, None)


def test_differences_name_every_entry_that_json_tells_apart():
    old = {"a": 1, "b": (1, 2), "c": None, "d": 0.5}
    assert differences(old, {"b": [1, 2], "a": 1, "d": 0.5, "c": None}) == ""
    assert differences(old, {"a": 2, "b": [1], "d": 0.5, "e": "x"}) == (
        "a is 1 there and 2 here, b is [1, 2] there and [1] here, e is None there and x here"
    )


# --- A run of an earlier version ------------------------------------------------------------------

SIZES = {"n_conv": 4, "n_primary": 3, "primary_dim": 2, "digit_dim": 3, "decoder_units": (2,)}


def test_the_weights_of_a_run_of_an_earlier_version_give_the_outputs_they_gave_then():
    net = CapsNet((28, 28, 1), 10, **SIZES, conv="dft")
    expected = np.load(OLD_RUN / "expected.npz")
    metadata = load_weights(net, OLD_RUN / "checkpoint" / "mnist", print)
    assert metadata["step"] == expected["step"] == 75
    lengths, capsules = net(expected["images"] / np.float32(255))
    np.testing.assert_allclose(lengths, expected["lengths"], atol=1e-5)
    np.testing.assert_allclose(capsules, expected["capsules"], atol=1e-5)
    assert np.ptp(expected["lengths"]) > 0.1


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    folders = folders_in(tmp_path)
    shutil.copytree(OLD_RUN / "checkpoint" / "mnist", folders.checkpoint)
    metadata = read_metadata(folders.checkpoint, 75)["training"]
    settings = {name: metadata.pop(name) for name in TrainingConfig._fields}
    mnist = datasets.load_dataset("mnist", ROOT / "data")
    data = Examples(mnist.x_train[:96], mnist.y_train[:96])
    kept, held_out = split_validation(96, settings["seed"])
    net = CapsNet((28, 28, 1), 10, **SIZES)
    trainer = Trainer(
        net,
        data.subset(kept),
        TrainingConfig(**settings),
        Run(folders, metadata),
        data.subset(held_out),
        Device(jit=False),
    )
    assert trainer.fit(15, 500) is False and trainer.resumed_step == 75
    reader = tf.train.load_checkpoint(str(folders.checkpoint / "ckpt-75"))
    groups = ("weights", net.variables), ("optimizer", trainer.optimizer.variables)
    for group, variables in groups:
        for variable in variables:
            saved = reader.get_tensor(f"{group}/{variable.path.replace('/', '.S')}{VALUE}")
            np.testing.assert_array_equal(variable.numpy(), saved)
    assert trainer.state.best_loss == reader.get_tensor("best" + VALUE) < 10
    before = net.get_weights()
    assert trainer.fit(15.2, 500) and saved_steps(folders.checkpoint) == [76, 75]
    moved = max(np.abs(a - b).max() for a, b in zip(net.get_weights(), before, strict=True))
    assert 0 < moved < 2 * settings["learning_rate"]
    assert trainer.optimizer.iterations.numpy() == 76
