import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

import datasets
from errors import UserError

DATA = Path(__file__).parent.parent / "data"


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


RAMP = np.arange(5 * 6 * 4 * 3, dtype=np.uint8).reshape(5, 6, 4, 3)


def colour_arrays(**changes):
    """Arrays of a data set in colour: five images to train, two to test, three classes."""
    arrays = {
        "x_train": RAMP,
        "y_train": np.array([0, 1, 2, 0, 1]),
        "x_test": RAMP[:2] // 2,
        "y_test": np.array([[2], [1]]),
    }
    return arrays | changes


def test_an_npz_file_may_hold_grey_or_coloured_images_as_bytes_or_floats(tmp_path):
    grey = colour_arrays(x_train=RAMP[..., 0], x_test=RAMP[:2, ..., :1])
    floats = colour_arrays(x_train=RAMP / 255, x_test=(RAMP[:2] // 2 / 255).astype(np.float32))
    for name, arrays in (("colour", colour_arrays()), ("grey", grey), ("floats", floats)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        data = datasets.load_dataset(str(tmp_path / f"{name}.npz"), "nowhere")
        assert data.name == name and data.class_names == ("0", "1", "2")
        assert data.x_train.dtype == np.uint8 and data.y_train.dtype == np.int32
        expected = RAMP[..., :1] if name == "grey" else RAMP
        np.testing.assert_array_equal(data.x_train, expected)
        np.testing.assert_array_equal(data.x_test, expected[:2] // (1 if name == "grey" else 2))
        assert data.y_test.tolist() == [2, 1]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"x_train": RAMP / 1.0}, r"float64 from 0.0 to \d+\.0, expected uint8, or floats"),
        ({"x_train": RAMP / np.float32("nan")}, "expected uint8, or floats"),
        ({"x_train": RAMP[..., None]}, r"expected \(N, H, W\)"),
        ({"x_train": RAMP[..., :2]}, "expected one size"),
        ({"x_train": RAMP[:0], "y_train": np.zeros(0, int)}, "N at least 1"),
        ({"x_test": RAMP[:2, :5]}, "expected one size"),
        ({"y_train": np.zeros(4, int)}, "5 integers"),
        ({"y_train": np.array([0, 1, 0.5, 1, 2])}, "5 integers"),
        ({"y_test": np.array([0, -1])}, "2 integers from 0"),
        ({"y_test": np.array([0, 2**31])}, "2 integers from 0"),
        ({"y_test": np.array([0, np.nan])}, "2 integers from 0"),
        ({"y_test": np.array([0, 3])}, "y_test up to 3, expected .* all of them in y_train"),
        ({"y_train": np.array([0, 1, 3, 0, 3])}, "3 different labels up to 3, .* all of them in y_train"),
        ({"y_train": np.zeros(5, int), "y_test": np.zeros(2, int)}, "expected two classes"),
        ({"x_test": np.array([None, 1])}, "cannot be read"),
        ({"x_test": np.array([[["a"]]])}, "expected uint8, or floats"),
    ],
)
def test_an_npz_file_with_wrong_arrays_is_refused_in_one_line(tmp_path, changes, named):
    np.savez(tmp_path / "a.npz", **colour_arrays(**changes))
    with pytest.raises(UserError, match=named) as error:
        datasets.load_dataset(str(tmp_path / "a.npz"), "")
    assert "a.npz" in one_line(error)


def test_thousands_of_float_images_are_converted_one_by_one_to_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 3), np.uint8)
    arrays = {"x_train": images / 255, "y_train": np.arange(2500) % 2}
    arrays |= {"x_test": images[:1001] / 255, "y_test": np.zeros(1001, int)}
    np.savez(tmp_path / "a.npz", **arrays)
    data = datasets.load_dataset(str(tmp_path / "a.npz"), "")
    np.testing.assert_array_equal(data.x_train[..., 0], images)
    np.testing.assert_array_equal(data.x_test[..., 0], images[:1001])


def test_a_damaged_npz_file_is_refused_in_one_line(tmp_path):
    arrays = colour_arrays()
    del arrays["y_test"]
    np.savez(tmp_path / "part.npz", **arrays)
    np.savez_compressed(tmp_path / "cut.npz", **colour_arrays())
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"hello")
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, RAMP)
    with zipfile.ZipFile(tmp_path / "strange.npz", "w") as file:
        for name in colour_arrays():
            file.writestr(name, b"no array")
    (tmp_path / "flipped.npz").write_bytes(whole[:80] + b"xxxx" + whole[84:])
    (tmp_path / "cut.npz").write_bytes(whole[:-100])
    with zipfile.ZipFile(tmp_path / "bracket.npz", "w") as file:
        for name in colour_arrays():
            buffer = io.BytesIO()
            np.save(buffer, RAMP)
            file.writestr(f"{name}.npy", buffer.getvalue().replace(b"}", b" "))
    for name in (
        "part",
        "cut",
        "empty",
        "text",
        "flipped",
        "missing",
        "single",
        "strange",
        "bracket",
    ):
        with pytest.raises(UserError, match=name) as error:
            datasets.load_dataset(str(tmp_path / f"{name}.npz"), "")
        assert "expected" in one_line(error) or "does not exist" in one_line(error)
