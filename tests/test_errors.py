import errno
import inspect
import os

import pytest

from capsnet_core import errors

# One error of each class, its message, and the attributes that the program adds its advice from.
EXAMPLES = [
    (errors.UsageError("no"), "no", {}),
    (errors.UserError("no"), "no", {}),
    (
        errors.DataFileError("a.gz", "is damaged", "mnist"),
        "a.gz: is damaged",
        {"place": "a.gz", "problem": "is damaged", "dataset": "mnist"},
    ),
    (
        errors.DataFileError("a.gz", OSError("is damaged")),
        "a.gz: is damaged",
        {"place": "a.gz", "dataset": None},
    ),
    (
        errors.ImageSizesDiffer("b/1.png", (9, 7), "a/1.png", (4, 6)),
        "b/1.png has 7×9 pixels, expected 6×4 like a/1.png",
        {"path": "b/1.png", "size": (9, 7), "first_path": "a/1.png", "first_size": (4, 6)},
    ),
    (
        errors.ImageTooSmall(9, [16, 28, 1]),
        "two 9×9 convolutions need images of at least 17×17 pixels. "
        "Received: image_shape=(16, 28, 1)",
        {"smallest": 17, "image_shape": (16, 28, 1)},
    ),
    (errors.NoCheckpoint("a"), "no checkpoint in a", {"folder": "a"}),
    (
        errors.DamagedCheckpoints("a"),
        "a: every checkpoint is damaged, expected an intact one",
        {"folder": "a"},
    ),
    (
        errors.NetworkMismatch("a", "n_conv 1 and 2"),
        "a holds another network: n_conv 1 and 2",
        {"place": "a", "differences": "n_conv 1 and 2"},
    ),
    (
        errors.PretrainedMismatch("a", "n_conv 1 and 2"),
        "a holds another network: n_conv 1 and 2",
        {"place": "a", "differences": "n_conv 1 and 2"},
    ),
    (
        errors.NoPretrainedWeights("kmnist", "mnist"),
        "no pretrained weights for kmnist; available: mnist",
        {"name": "kmnist", "available": "mnist"},
    ),
    (
        errors.NoPretrainedWeights("kmnist", ""),
        "no pretrained weights for kmnist; available: none",
        {"name": "kmnist", "available": ""},
    ),
    (
        errors.RunMismatch("a", 3, 60, "seed 0 and 1"),
        "a holds an unfinished run (step 3 of 60) of other settings: seed 0 and 1",
        {"folder": "a", "step": 3, "last_step": 60, "differences": "seed 0 and 1"},
    ),
    (errors.FolderInUse("a"), "another run is training in a", {"folder": "a"}),
    (
        errors.FolderTaken("a", "b"),
        "a belongs to the run in b",
        {"folder": "a", "owner": "b"},
    ),
    (
        errors.NotFinite("the loss is", 7),
        "the loss is not finite at step 7; the checkpoints before it are kept",
        {"what": "the loss is", "step": 7},
    ),
    (errors.Interrupted(15), "stopped by signal 15", {"number": 15}),
]


@pytest.mark.parametrize("error, message, attributes", EXAMPLES)
def test_an_error_has_a_message_and_carries_its_details(error, message, attributes):
    assert str(error) == message
    for name, value in attributes.items():
        assert getattr(error, name) == value, name


def test_every_error_has_an_example():
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass)}
    assert classes == {type(error) for error, *_ in EXAMPLES}


def test_all_errors_but_those_with_an_exit_code_of_their_own_are_caught_as_user_errors():
    others = errors.UsageError, errors.Interrupted
    for error, *_ in EXAMPLES:
        assert isinstance(error, errors.UserError) != isinstance(error, others)


def test_pretrained_weights_that_do_not_fit_are_a_network_mismatch():
    assert isinstance(errors.PretrainedMismatch("a", "b"), errors.NetworkMismatch)


@pytest.mark.parametrize(
    "number, helps",
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "make this one writable"),
        (errno.EROFS, "make this one writable"),
        (errno.ENOTDIR, "choose another name"),
        (errno.EIO, ""),
    ],
)
def test_advice_is_for_what_went_wrong_whoever_reports_it(number, helps):
    tensorflow_error = RuntimeError(f"a/b; {os.strerror(number)} [Op:Save]")
    for error in OSError(number, "in any words"), tensorflow_error:
        assert helps in errors.os_advice(error) and bool(errors.os_advice(error)) is bool(helps)
    assert errors.os_advice(OSError("without a number")) == ""
