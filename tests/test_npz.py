import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from capsnet_core.errors import UserError
from inputs import datasets

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
        ({"x_train": RAMP / 2}, r"float64 from 0.0 to \d+\.\d, expected uint8, or floats"),
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
        (
            {"y_train": np.array([0, 1, 3, 0, 3])},
            "3 different labels up to 3, .* all of them in y_train",
        ),
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


# --- What images and labels may be ----------------------------------------------------------------

BYTES = np.random.default_rng(0).integers(0, 256, (12, 4, 4)).astype(np.uint8)
BYTES[0, 0, :2] = 0, 255


def load(folder, **changes):
    """Load a .npz file of twelve images, ten of them to train; `changes` replace arrays."""
    arrays = {"x_train": BYTES[:10], "y_train": np.arange(10) % 3}
    arrays |= {"x_test": BYTES[10:], "y_test": np.array([1, 2])}
    np.savez(folder / "a.npz", **arrays | changes)
    return datasets.load_dataset(str(folder / "a.npz"), "")


def images(array):
    return {"x_train": array[:10], "x_test": array[10:]}


def test_bytes_from_0_to_255_are_taken_as_they_are_without_a_word(tmp_path):
    data = load(tmp_path)
    np.testing.assert_array_equal(np.concatenate([data.x_train, data.x_test])[..., 0], BYTES)
    assert data.notes == () and not data.inverted and data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    "white, dtypes",
    [
        (1, [bool, np.uint8, np.int8, np.uint16, np.int64]),
        (16, [np.uint8, np.int32, np.int64, np.float64]),  # scikit-learn's digits are floats
        (255, [np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64, np.float32]),
        (1023, [np.uint16, np.int64, np.float16]),
        (4095, [np.uint16, np.int32, np.float32]),
        (65535, [np.uint16, np.int32, np.int64, np.float32]),
    ],
)
def test_whole_numbers_of_every_type_and_range_become_bytes_and_a_line_says_so(
    tmp_path, white, dtypes
):
    levels = np.random.default_rng(1).integers(0, white, (12, 4, 4), endpoint=True)
    levels[0, 0, :2] = 0, white
    expected = [
        [[round(value * 255 / white) for value in row] for row in image]
        for image in levels.tolist()
    ]
    for dtype in dtypes:
        data = load(tmp_path, **images(levels.astype(dtype)))
        assert data.x_train.dtype == data.x_test.dtype == np.uint8
        assert np.concatenate([data.x_train, data.x_test])[..., 0].tolist() == expected
        (note,) = data.notes
        scaled = "taken as uint8" if white == 255 else "scaled to 0 to 255"
        assert note == f"images are {np.dtype(dtype)} from 0 to {white}, {scaled}"


@pytest.mark.parametrize(
    "largest, dtype",
    [
        *((largest, np.uint8) for largest in (2, 7, 15)),
        *(
            (largest, np.int64)
            for largest in (2, 15, 17, 100, 256, 511, 1024, 2047, 4096, 20000, 65536)
        ),
    ],
)
def test_whole_numbers_that_do_not_say_what_white_is_are_refused(tmp_path, largest, dtype):
    array = (BYTES.astype(int) % 2 * largest).astype(dtype)
    with pytest.raises(UserError, match="what stands for white is unclear") as error:
        load(tmp_path, **images(array))
    assert f"from 0 to {largest}" in one_line(error) and "16, 255, 1023, 4095 or 65535" in str(
        error.value
    )


def test_test_images_need_not_reach_the_white_of_the_training_images(tmp_path):
    dark = np.full((2, 4, 4), 40)
    data = load(tmp_path, x_train=BYTES[:10].astype(int), x_test=dark)
    assert (data.x_test == 40).all()
    sums = BYTES[:10] // 16
    sums[0, 0, 0] = 16
    assert (load(tmp_path, x_train=sums, x_test=dark // 10).x_test == 64).all()  # 255 / 4
    assert not load(tmp_path, x_test=0 * dark).x_test.any()


def test_test_images_of_another_range_than_the_training_images_are_refused(tmp_path):
    bits = BYTES % 2
    for train, test in (BYTES, bits), (bits, BYTES), (BYTES.astype(np.uint16) * 257, BYTES):
        with pytest.raises(UserError, match="x_test is .* while x_train is from 0 to") as error:
            load(tmp_path, x_train=train[:10], x_test=test[10:])
        one_line(error)


@pytest.mark.parametrize(
    "array, advice",
    [
        (BYTES / 127.5 - 1, "for a range of -1 to 1 write (x_train + 1) / 2"),
        (BYTES.astype(np.int8), "x_train.view('uint8')"),
        ((BYTES - 128.0) / 60, "if the images were standardized, undo that"),
        (np.where(BYTES > 250, np.nan, BYTES / 255), "NaN or infinite"),
        (np.where(BYTES > 250, np.inf, BYTES / 255), "numpy.nan_to_num(x_train)"),
        (BYTES / 2, "divide them by the value of white"),
        (BYTES.astype(complex), "complex128, expected uint8, or floats from 0 to 1"),
        (BYTES[:, None].repeat(3, 1).repeat(2, 2).repeat(2, 3), "numpy.moveaxis(x_train, 1, -1)"),
        (BYTES.reshape(12, 16)[:, :15], "for square images, (N, H * W)"),
        (
            np.zeros((12, 3072), np.uint8),
            "write x_train.reshape(-1, 32, 32, 3), or, if the channels",
        ),
        (np.zeros((12, 3072), np.uint8), "numpy.moveaxis(x_train.reshape(-1, 3, 32, 32), 1, -1)"),
    ],
)
def test_images_that_cannot_be_used_get_the_advice_that_helps_them(tmp_path, array, advice):
    with pytest.raises(UserError) as error:
        load(tmp_path, **images(array))
    assert advice in one_line(error)


def test_flat_images_are_square_and_a_line_says_so(tmp_path):
    data = load(tmp_path, **images(BYTES.reshape(12, 16)))
    np.testing.assert_array_equal(data.x_train[..., 0], BYTES[:10])
    assert data.notes == ("images of 16 numbers taken as 4x4 pixels",)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_images_may_have_any_number_of_channels(tmp_path, channels):
    array = np.stack([np.roll(BYTES, n) for n in range(channels)], axis=-1)
    data = load(tmp_path, **images(array))
    np.testing.assert_array_equal(data.x_train, array[:10])
    assert data.notes == ()


@pytest.mark.parametrize(
    "labels, note",
    [
        (np.arange(12) % 3, None),
        (np.arange(12, dtype=np.uint8)[:, None] % 3, None),
        (np.arange(12) % 3.0, "labels are float64, taken as integers"),
        (np.eye(3)[np.arange(12) % 3], "labels are one-hot rows of 3"),
        (np.eye(3, dtype=np.uint8)[np.arange(12) % 3], "labels are one-hot rows of 3"),
        (np.eye(3, dtype=bool)[np.arange(12) % 3], "labels are one-hot rows of 3"),
    ],
)
def test_labels_may_be_integers_whole_floats_or_one_hot_rows(tmp_path, labels, note):
    data = load(tmp_path, y_train=labels[:10], y_test=labels[10:])
    assert data.y_train.dtype == data.y_test.dtype == np.int32
    assert data.y_train.tolist() == [0, 1, 2] * 3 + [0] and data.y_test.tolist() == [1, 2]
    assert data.notes == (() if note is None else (f"{note}",))


def test_labels_that_are_true_or_false_are_two_classes(tmp_path):
    labels = np.arange(12) % 2 == 1
    data = load(tmp_path, y_train=labels[:10], y_test=labels[10:])
    assert data.y_train.tolist() == [0, 1] * 5 and data.class_names == ("0", "1")
    assert data.notes == ("labels are bool, taken as integers",)


@pytest.mark.parametrize("numbers", [[1, 2, 3], [0, 5, 26], [10, 1000, 2000]])
def test_labels_with_gaps_are_numbered_from_0_and_their_classes_keep_the_numbers(tmp_path, numbers):
    labels = np.array(numbers)[np.arange(12) % 3]
    data = load(tmp_path, y_train=labels[:10], y_test=labels[10:])
    assert data.class_names == tuple(map(str, numbers))
    assert [numbers[label] for label in data.y_train] == labels[:10].tolist()
    assert data.y_test.tolist() == [1, 2]
    (note,) = data.notes
    assert note.startswith(f"3 different labels from {numbers[0]} to {numbers[-1]} numbered")


def test_more_than_a_thousand_classes_are_refused(tmp_path):
    array = np.zeros((1001, 1, 2), np.uint8)
    for count in 1000, 1001:
        arrays = {"x_train": array[:count], "y_train": np.arange(count)}
        if count == 1000:
            assert len(load(tmp_path, **arrays, x_test=array[:2]).class_names) == 1000
        else:
            with pytest.raises(UserError, match="1001 different labels .* at most 1000"):
                load(tmp_path, **arrays, x_test=array[:2])


def test_floats_and_whole_numbers_in_one_file_are_refused(tmp_path):
    images, labels = np.ones((4, 5, 5), np.uint8), np.arange(4) % 2
    for x_train, x_test in (images, images / 1.0), (images.astype(np.float32), images):
        np.savez(tmp_path / "a.npz", x_train=x_train, y_train=labels, x_test=x_test, y_test=labels)
        with pytest.raises(UserError, match="x_train is .* and x_test .*, expected the same type"):
            datasets.load_dataset(str(tmp_path / "a.npz"), "")


def test_floats_that_were_scaled_twice_are_refused(tmp_path):
    images, labels = np.ones((4, 5, 5), np.float32) / 255, np.arange(4) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(UserError, match="divided by 255 twice"):
        datasets.load_dataset(str(tmp_path / "a.npz"), "")


@pytest.mark.parametrize(
    "shape, remedy",
    [
        ((4, 4, 10), "numpy.moveaxis(x_train, -1, 0)"),
        ((4, 4, 3, 10), "numpy.moveaxis(x_train, -1, 0)"),  # as in SVHN's files
        ((16, 10), "x_train.T"),
    ],
)
def test_images_along_the_last_axis_are_refused_and_the_remedy_is_right(tmp_path, shape, remedy):
    right = np.random.default_rng(0).integers(0, 256, (10, *shape[:-1]), np.uint8)
    right[0] = 255
    x_train = np.moveaxis(right, 0, -1)
    assert x_train.shape == shape
    arrays = {"x_test": right[:2], "y_test": np.array([0, 1])}
    with pytest.raises(UserError, match="with the images along the last axis") as error:
        load(tmp_path, x_train=x_train, **arrays)
    assert one_line(error).endswith(f"write {remedy}")
    mended = eval(remedy, {"numpy": np, "x_train": x_train})
    data = load(tmp_path, x_train=mended, **arrays)
    assert data.x_train.tobytes() == right.tobytes()


def test_labels_in_a_row_or_in_one_hot_columns_are_refused_with_a_remedy(tmp_path):
    for labels, remedy in (
        (np.arange(10)[None] % 3, "y_train.reshape(-1)"),
        (
            np.eye(3)[np.arange(10) % 3].T,
            "y_train.T",
        ),
    ):
        with pytest.raises(UserError, match="expected 10 integers from 0") as error:
            load(tmp_path, y_train=labels)
        assert one_line(error).endswith(f"write {remedy}")


def test_floats_from_0_to_1_in_training_and_whole_numbers_in_test_are_refused(tmp_path):
    for train, test in (BYTES / 255, BYTES / 1.0), (BYTES / 1.0, BYTES / 255):
        with pytest.raises(UserError, match="x_test is .* while x_train is from 0 to"):
            load(tmp_path, x_train=train[:10], x_test=test[10:])


# --- Names and further arrays ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["U7", "S7"])
def test_labels_may_be_text_and_the_classes_come_in_natural_order(tmp_path, kind):
    names = np.array(["b10", "b9", "a"], kind)
    data = load(tmp_path, y_train=names[np.arange(10) % 3], y_test=names[[1, 2]])
    assert data.class_names == ("a", "b9", "b10")
    assert data.y_train.dtype == np.int32
    assert data.y_train.tolist() == [2, 1, 0] * 3 + [2] and data.y_test.tolist() == [1, 0]
    assert data.notes == ("labels are text, 3 classes in natural order",)


def test_text_that_is_no_utf_8_and_control_characters_are_escaped(tmp_path):
    names = np.array([b"\xff", "\u00fc".encode(), b"a\nb"])
    data = load(tmp_path, y_train=names[np.arange(10) % 3], y_test=names[[1, 2]])
    assert set(data.class_names) == {"\\xff", "\u00fc", "a\\nb"}


def test_text_and_numbers_as_labels_in_one_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="y_train is <U1, y_test is int64, expected numbers in all"):
        load(tmp_path, y_train=np.array(list("abcabcabca")))
    with pytest.raises(UserError, match="y_test up to d, expected .* all of them in y_train"):
        load(tmp_path, y_train=np.array(list("abcabcabca")), y_test=np.array(["a", "d"]))


def test_objects_as_labels_are_refused_with_what_to_write(tmp_path):
    with pytest.raises(UserError, match="text as numpy.array.labels, str") as error:
        load(tmp_path, y_train=np.array(list("abcabcabca"), object))
    one_line(error)


@pytest.mark.parametrize("kind", [str, "S9", object])
def test_class_names_name_the_classes_by_their_numbers(tmp_path, kind):
    names = np.array(["zebra", "ant", "cow"], kind)
    if kind is object:
        with pytest.raises(UserError, match="cannot be read"):
            load(tmp_path, class_names=names)
        return
    data = load(tmp_path, class_names=names)
    assert data.class_names == ("zebra", "ant", "cow") and data.notes == ()
    assert data.y_train.tolist() == [0, 1, 2] * 3 + [0]


def test_class_names_of_labels_with_gaps_are_as_many_as_classes_or_one_for_each_number(tmp_path):
    labels = np.array([1, 3, 4])
    arrays = {"y_train": labels[np.arange(10) % 3], "y_test": labels[[1, 2]]}
    few, many = np.array(list("abc")), np.array(list("vwxyz"))
    assert load(tmp_path, **arrays, class_names=few).class_names == ("a", "b", "c")
    data = load(tmp_path, **arrays, class_names=many)
    assert data.class_names == ("w", "y", "z") and data.y_test.tolist() == [1, 2]
    assert data.notes[0] == "2 of class_names have no training images"
    assert data.notes[1].endswith("the classes are named by class_names")
    for names in (many[:2], many[:4], np.array(list("aab"))):
        with pytest.raises(UserError, match="class_names has") as error:
            load(tmp_path, **arrays, class_names=names)
        one_line(error)


def test_class_names_order_the_classes_of_text_labels(tmp_path):
    labels = np.array(["cat", "dog", "ape"])
    arrays = {"y_train": labels[np.arange(10) % 3], "y_test": labels[[1, 2]]}
    data = load(tmp_path, **arrays, class_names=np.array(["dog", "eel", "cat", "ape"]))
    assert data.class_names == ("dog", "cat", "ape")
    assert data.y_train.tolist() == [1, 0, 2] * 3 + [1] and data.y_test.tolist() == [0, 2]
    with pytest.raises(UserError, match="expected a name for each"):
        load(tmp_path, **arrays, class_names=np.array(["dog", "cat", "bee"]))


def test_images_for_validation_are_read_like_those_of_the_test(tmp_path):
    validation = {"x_val": BYTES[:4] // 2, "y_val": np.array([2, 1, 0, 2])}
    data = load(tmp_path, **validation)
    np.testing.assert_array_equal(data.x_validation[..., 0], BYTES[:4] // 2)
    assert data.y_validation.tolist() == [2, 1, 0, 2] and data.notes == ()
    assert data.x_validation.dtype == np.uint8 and data.y_validation.dtype == np.int32
    assert load(tmp_path).x_validation is None
    for changes, named in (
        ({"y_val": np.array([0, 1, 2])}, "y_val is int64 of shape .3,., expected 4 integers"),
        ({"y_val": np.array([0, 1, 2, 3])}, "y_val up to 3, expected .* all of them in y_train"),
        ({"x_val": BYTES[:4, :3]}, "in training and .3, 4, 1. in validation, expected one size"),
        ({"x_val": BYTES[:4] / 255}, "x_train is uint8 and x_val float64, expected the same type"),
    ):
        with pytest.raises(UserError, match=named) as error:
            load(tmp_path, **validation | changes)
        one_line(error)
    with pytest.raises(UserError, match="y_val is not a file in the archive"):
        load(tmp_path, x_val=BYTES[:4])


def test_arrays_that_are_not_used_are_named(tmp_path):
    assert load(tmp_path, x_extra=BYTES, ids=np.arange(3)).notes == ("left out: x_extra, ids",)
