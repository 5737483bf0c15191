import hashlib

import numpy as np
import pytest

import main
from commands.data import load_data


@pytest.fixture
def own_images(tmp_path, monkeypatch):
    """A file own.npz in the working folder: 60 images, sorted by their three classes."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 20), np.uint8)
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    np.savez("own.npz", x_train=images, y_train=labels, x_test=images[::9], y_test=labels[::9])
    return images[..., None], labels


def data_of(*words):
    flags = main.parse(["main.py", "--train", *words])
    return load_data(flags, lambda line: None)


def test_of_a_sorted_file_some_images_of_each_class_are_trained_drawn_by_the_seed(own_images):
    words = ["--dataset=own.npz", "--train_size=12"]
    data, other = data_of(*words), data_of(*words, "--seed=1")
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert data.digest(12) != other.digest(12) and data.digest(0) == other.digest(0)
    settings = {"train_size": 12, "seed": 0, "data": data.digest(12)}
    assert data.trained(settings) and other.trained(settings)
    assert not data.trained(settings | {"seed": 1})


def test_runs_of_earlier_versions_trained_on_the_first_images_and_are_known(own_images):
    images, labels = own_images
    data = data_of("--dataset=own.npz")
    content = hashlib.sha256(images[:12].tobytes() + labels[:12].tobytes()).hexdigest()[:16]
    assert data.trained({"train_size": 12, "data": content})
    assert not data.trained({"train_size": 11, "data": content})
    assert not data.trained({"train_size": 0, "data": content})


@pytest.mark.parametrize("words", [[], ["--train_size=300"], ["--train_size=300", "--seed=4"]])
def test_the_fingerprint_of_mnist_is_that_of_its_first_images_whatever_the_seed(words):
    """So that runs of earlier versions are resumed."""
    data = data_of(*words)
    size = data.train_size or None
    images, labels = data.dataset.x_train[:size], data.dataset.y_train[:size]
    np.testing.assert_array_equal(data.train.images, images)
    content = images.tobytes() + labels.astype(np.int32).tobytes()
    assert data.digest(data.train_size) == hashlib.sha256(content).hexdigest()[:16]


def test_arrays_for_validation_are_used_as_a_folder_is(own_images):
    images, labels = own_images
    arrays = dict(np.load("own.npz"))
    np.savez("own.npz", **arrays, x_val=images[:7, ..., 0], y_val=labels[:7])
    assert data_of("--dataset=own.npz").validation is None
    data = data_of("--dataset=own.npz", "--validation_check")
    np.testing.assert_array_equal(data.validation.images, images[:7])
    assert len(data.train.labels) == 60 and not data.held_out
