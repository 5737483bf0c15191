import errno
import gzip
import hashlib
import io
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from utils import UserError

DATA = Path(__file__).parent.parent / "data"
DIGITS = utils.CLASS_NAMES["mnist"]
RED = (192, 57, 43)


@pytest.fixture(scope="module")
def mnist():
    return utils.load_dataset("mnist", DATA)


def idx_bytes(array, code=0x08, counts=None):
    counts = array.shape if counts is None else counts
    return struct.pack(f">HBB{len(counts)}i", 0, code, len(counts), *counts) + array.tobytes()


def write_gz(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))
    return path


def write_dataset(folder, **changes):
    """A tiny MNIST-like data set of 12 training and 6 test images; `changes` replace arrays."""
    arrays = {
        "train-images-idx3-ubyte": np.arange(12 * 5 * 4, dtype=np.uint8).reshape(12, 5, 4),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4),
        "t10k-labels-idx1-ubyte": np.arange(6, dtype=np.uint8),
    }
    for name, array in arrays.items():
        array = changes.get(name.split("-idx")[0].replace("-", "_"), array)
        write_gz(folder / f"{name}.gz", idx_bytes(array))


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---------------------------------------------------------------- files


def test_a_file_written_atomically_has_its_content_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with utils.atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        temporary.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert os.listdir(target.parent) == ["a.txt"]


def test_who_reads_the_old_file_goes_on_reading_it_while_a_new_one_takes_its_place(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with open(target) as reader:
        utils.write_json(target, "new")
        assert reader.read() == "old"
    assert json.loads(target.read_text()) == "new"


def test_a_failure_while_writing_keeps_the_old_file_and_no_temporary_one(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), utils.atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise failure
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_operating_system_error_becomes_a_user_error_with_path_and_reason(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "below.txt", tmp_path):
        with pytest.raises(UserError) as error, utils.atomic_path(target) as temporary:
            temporary.write_text("x")
        assert f"cannot write {target}: [Errno" in one_line(error)
    full = pytest.raises(UserError, match="full.txt: .*No space left on device")
    with full, utils.atomic_path(tmp_path / "full.txt") as temporary:
        temporary.write_text("as far as it g")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == ["file"]


def test_a_written_file_has_the_permissions_of_any_other_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    utils.write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_holds_numpy_numbers_and_arrays(tmp_path):
    utils.write_json(tmp_path / "a.json", {"error": np.float32(0.5), "counts": np.arange(3)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"error": 0.5, "counts": [0, 1, 2]}


# ---------------------------------------------------------------- IDX files


def test_an_idx_file_gives_back_the_bytes_put_in(tmp_path):
    for shape in ((7,), (3, 5, 4), (1, 1, 1)):
        array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        read = utils.read_idx(write_gz(tmp_path / "a.gz", idx_bytes(array)))
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)


IMAGES = np.arange(60, dtype=np.uint8).reshape(3, 5, 4)
GOOD = idx_bytes(IMAGES)
SQUEEZED = gzip.compress(GOOD)
HOSTILE = {
    "wrong magic": (gzip.compress(b"\1" + GOOD[1:]), "starts with 01 00 08 03"),
    "signed bytes": (gzip.compress(idx_bytes(IMAGES, code=0x09)), "starts with 00 00 09 03"),
    "two dimensions": (gzip.compress(idx_bytes(IMAGES[0])), "starts with 00 00 08 02"),
    "no dimensions": (gzip.compress(b"\0\0\x08\0"), "starts with 00 00 08 00"),
    "nothing": (gzip.compress(b""), "starts with"),
    "half a header": (gzip.compress(GOOD[:11]), "ends within its header"),
    "a negative count": (gzip.compress(idx_bytes(IMAGES, counts=(-3, 5, 4))), "-3, 5, 4"),
    "no images": (gzip.compress(idx_bytes(IMAGES[:0])), "0, 5, 4"),
    "too large a count": (gzip.compress(idx_bytes(IMAGES, counts=(4, 5, 4))), "holds only 60"),
    "too small a count": (gzip.compress(idx_bytes(IMAGES, counts=(2, 5, 4))), "holds more"),
    "absurd counts": (gzip.compress(idx_bytes(IMAGES, counts=(2**31 - 1,) * 3)), "are possible"),
    "truncated data": (gzip.compress(GOOD[:-1]), "holds only 59"),
    "trailing bytes": (gzip.compress(GOOD + b"\0"), "holds more"),
    "truncated gzip": (SQUEEZED[:-12], "ended before"),
    "wrong checksum": (SQUEEZED[:-8] + b"\0\0\0\0" + SQUEEZED[-4:], "CRC check failed"),
    "damaged deflate": (SQUEEZED[:10] + b"\xff" * 20 + SQUEEZED[30:], "while decompressing"),
    "not gzipped": (GOOD, "Not a gzipped file"),
    "garbage after the gzip stream": (SQUEEZED + b"garbage", "Not a gzipped file"),
    "an empty file": (b"", "starts with"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_idx_file_is_refused_in_one_line_that_names_it(tmp_path, kind):
    content, reason = HOSTILE[kind]
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(UserError) as error:
        utils.read_idx(tmp_path / "a.gz", "do this")
    text = one_line(error)
    assert str(tmp_path / "a.gz") in text and reason in text and text.endswith("; do this")


def test_trailing_bytes_and_checksums_are_noticed_where_a_chunk_ends_too(tmp_path):
    content = idx_bytes(np.zeros(2**20, np.uint8))
    assert len(utils.read_idx(write_gz(tmp_path / "a.gz", content))) == 2**20
    with pytest.raises(UserError, match="holds more"):
        utils.read_idx(write_gz(tmp_path / "a.gz", content + b"\0"))
    squeezed = bytearray(gzip.compress(content))
    squeezed[-8] ^= 1
    (tmp_path / "a.gz").write_bytes(squeezed)
    with pytest.raises(UserError, match="CRC check failed"):
        utils.read_idx(tmp_path / "a.gz")


def test_what_is_not_a_readable_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, reason in (("", "regular"), ("pipe", "regular"), ("absent", "No such file")):
        with pytest.raises(UserError, match=reason):
            utils.read_idx(tmp_path / name)


def test_a_gzip_bomb_is_left_after_the_bytes_that_its_header_announced(tmp_path):
    squeeze = zlib.compressobj(9, wbits=31)
    zeros = bytes(2**20)
    bomb = squeeze.compress(struct.pack(">HBBi", 0, 8, 1, 100))
    bomb += b"".join(squeeze.compress(zeros) for _ in range(64)) + squeeze.flush()
    (tmp_path / "bomb.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(UserError, match="holds more"):
        utils.read_idx(tmp_path / "bomb.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < 64 * len(zeros)


def test_a_header_that_claims_gigabytes_costs_no_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8)
    for claim in (1024 * 2**20 - 1, 2**31 - 1):  # below the bounds, and above
        write_gz(tmp_path / "a.gz", idx_bytes(noise, counts=(claim,)))
        tracemalloc.start()
        with pytest.raises(UserError, match="header claims"):
            utils.read_idx(tmp_path / "a.gz")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20


def test_a_mutated_idx_file_is_read_at_the_right_size_or_refused(tmp_path):
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(150):
        inside = trial % 3 > 0  # two thirds: mutate what is compressed, else the .gz itself
        content = bytearray(GOOD if inside else SQUEEZED)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            content[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path = tmp_path / "a.gz"
        path.write_bytes(gzip.compress(content) if inside else content)
        try:
            array = utils.read_idx(path)
        except UserError:
            outcomes["refused"] += 1
        else:
            assert array.dtype == np.uint8 and array.size in (len(content) - 8, 60)
            outcomes["read"] += 1
    assert min(outcomes.values()) >= 20


# ---------------------------------------------------------------- data sets


def test_mnist_has_its_known_images_and_labels(mnist):
    assert mnist.x_train.shape == (60000, 28, 28, 1) and mnist.x_test.shape == (10000, 28, 28, 1)
    assert mnist.x_train.dtype == np.uint8 and mnist.y_train.dtype == np.int32
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert [int((mnist.y_train == digit).sum()) for digit in range(10)] == counts
    assert mnist.y_train[:5].tolist() == [5, 0, 4, 1, 9] and mnist.y_test[0] == 7
    assert round(float(mnist.x_train.mean()) / 255, 4) == 0.1307  # as widely published
    assert mnist.class_names == tuple("0123456789")


def test_every_known_set_is_loaded_from_its_own_folder(tmp_path):
    for name, first, last in (("mnist", "0", "9"), ("fashion_mnist", "T-shirt/top", "Ankle boot")):
        write_dataset(tmp_path / name)
        data = utils.load_dataset(name, tmp_path)
        assert data.name == name and len(data.class_names) == 10
        assert (data.class_names[0], data.class_names[-1]) == (first, last)
        assert data.x_train.shape == (12, 5, 4, 1) and data.y_train.tolist()[-2:] == [0, 1]
        assert data.x_test[1, 0, :, 0].tolist() == [20, 21, 22, 23]
    assert " ".join(utils.CLASS_NAMES["kmnist"]) == "o ki su tsu na ha ma ya re wo"


def test_a_missing_file_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(UserError) as error:
        utils.load_dataset("kmnist", tmp_path)
    assert "run: python download.py kmnist" in one_line(error)


def test_an_unknown_set_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="mnist, fashion_mnist, kmnist") as error:
        utils.load_dataset("mnits\n", tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    "name, array, reason",
    [
        ("train_labels", np.zeros(11, np.uint8), r"\(11,\) labels"),
        ("t10k_labels", np.full(6, 10, np.uint8), "up to 10"),
        ("t10k_images", np.zeros((6, 5, 5), np.uint8), "expected one size"),
        ("train_images", np.zeros(12, np.uint8), r"\(12,\) images"),
        ("train_labels", np.zeros((12, 1, 1), np.uint8), r"\(12, 1, 1\) labels"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, name, array, reason):
    write_dataset(tmp_path / "mnist", **{name: array})
    with pytest.raises(UserError, match=reason) as error:
        utils.load_dataset("mnist", tmp_path)
    assert "python download.py mnist" in one_line(error)


# ---------------------------------------------------------------- data of one's own

RAMP = np.arange(5 * 6 * 4 * 3, dtype=np.uint8).reshape(5, 6, 4, 3)


def own(**changes):
    """Arrays of a data set in colour: five images to train, two to test, three classes."""
    return {"x_train": RAMP, "y_train": np.array([0, 1, 2, 0, 1]), "x_test": RAMP[:2] // 2,
            "y_test": np.array([[2], [1]])} | changes


def test_an_npz_file_gives_its_arrays_whatever_their_form(tmp_path):
    grey = own(x_train=RAMP[..., 0], x_test=RAMP[:2, ..., :1])
    floats = own(x_train=RAMP / 255, x_test=(RAMP[:2] // 2 / 255).astype(np.float32))
    for name, arrays in (("colour", own()), ("grey", grey), ("floats", floats)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        data = utils.load_dataset(str(tmp_path / f"{name}.npz"), "nowhere")
        assert data.name == name and data.class_names == ("0", "1", "2")
        assert data.x_train.dtype == np.uint8 and data.y_train.dtype == np.int32
        expected = RAMP[..., :1] if name == "grey" else RAMP
        np.testing.assert_array_equal(data.x_train, expected)
        np.testing.assert_array_equal(data.x_test, expected[:2] // (1 if name == "grey" else 2))
        assert data.y_test.tolist() == [2, 1]


@pytest.mark.parametrize("changes, named", [
    ({"x_train": RAMP.astype(int)}, "expected uint8, or floats from 0 to 1"),
    ({"x_train": RAMP / 1.0}, r"float64 from 0.0 to \d+\.0, expected uint8, or floats"),
    ({"x_train": RAMP / np.float32("nan")}, "expected uint8, or floats"),
    ({"x_train": RAMP[..., :2]}, r"expected \(N, H, W\)"),
    ({"x_train": RAMP[:0], "y_train": np.zeros(0, int)}, "N at least 1"),
    ({"x_test": RAMP[:2, :5]}, "expected one size"),
    ({"y_train": np.zeros(4, int)}, "5 integers"),
    ({"y_train": np.zeros(5)}, "5 integers"),
    ({"y_test": np.array([0, -1])}, "2 integers from 0"),
    ({"y_test": np.array([0, 10**6])}, "2 integers from 0 to 999"),
    ({"y_test": np.array([0, 3])}, "y_test up to 3, expected .* all of them in y_train"),
    ({"y_train": np.array([0, 1, 3, 0, 3])}, "3 different labels up to 3, .* without gaps"),
    ({"y_train": np.array([1, 2, 3, 1, 1])}, "numbered from 0"),
    ({"y_train": np.zeros(5, int), "y_test": np.zeros(2, int)}, "expected two classes"),
    ({"x_test": np.array([None, 1])}, "cannot be read"),
    ({"x_test": np.array([[["a"]]])}, "expected uint8, or floats"),
])
def test_arrays_that_are_no_data_set_are_refused_in_one_line(tmp_path, changes, named):
    np.savez(tmp_path / "a.npz", **own(**changes))
    with pytest.raises(UserError, match=named) as error:
        utils.load_dataset(str(tmp_path / "a.npz"), "")
    assert "a.npz" in one_line(error)


def test_an_npz_file_that_is_none_is_refused(tmp_path):
    arrays = own()
    del arrays["y_test"]
    np.savez(tmp_path / "part.npz", **arrays)
    np.savez_compressed(tmp_path / "cut.npz", **own())
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"hello")
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, RAMP)
    with zipfile.ZipFile(tmp_path / "strange.npz", "w") as file:
        for name in own():
            file.writestr(name, b"no array")
    (tmp_path / "flipped.npz").write_bytes(whole[:80] + b"xxxx" + whole[84:])
    (tmp_path / "cut.npz").write_bytes(whole[:-100])
    with zipfile.ZipFile(tmp_path / "bracket.npz", "w") as file:
        for name in own():
            buffer = io.BytesIO()
            np.save(buffer, RAMP)
            file.writestr(f"{name}.npy", buffer.getvalue().replace(b"}", b" "))
    for name in ("part", "cut", "empty", "text", "flipped", "missing", "single", "strange",
                 "bracket"):
        with pytest.raises(UserError, match=name) as error:
            utils.load_dataset(str(tmp_path / f"{name}.npz"), "")
        assert "expected" in one_line(error) or "does not exist" in one_line(error)


def folders(root, colour, train=3):
    """A folder of images by class: cats and dogs, of 6×4 pixels, and what is to be passed over."""
    for split, count in (("train", train), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                value = 100 * label + 10 * number + (split == "test")
                pixels = np.full((6, 4, 3), value, np.uint8)
                pixels[..., 0] += 50 * (colour and name == "dog")
                Image.fromarray(pixels).save(place / f"{number}.png")
            (place / "notes.txt").write_text("no image")
        (root / split / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("colour", [False, True])
def test_a_folder_of_images_by_class_is_a_data_set(tmp_path, colour):
    data = utils.load_dataset(str(folders(tmp_path / "pets", colour)), "nowhere")
    assert data.name == "pets" and data.class_names == ("cat", "dog")
    assert data.x_train.shape == (6, 6, 4, 3 if colour else 1) and data.x_test.shape[0] == 4
    pairs = {split: sorted(zip(x.tolist(), y.tolist())) for split, x, y in (
        ("train", data.x_train[:, 0, 0, -1], data.y_train), ("test", data.x_test[:, 5, 3, 0], data.y_test))}
    assert pairs["train"] == [(0, 0), (10, 0), (20, 0), (100, 1), (110, 1), (120, 1)]
    more = 50 * colour
    assert pairs["test"] == [(1, 0), (11, 0), (101 + more, 1), (111 + more, 1)]


def test_the_classes_of_a_folder_are_mixed_the_same_way_each_time(tmp_path):
    folder = str(folders(tmp_path / "pets", False, train=10))
    labels = utils.load_dataset(folder, "").y_train
    assert 2 <= labels[:10].sum() <= 8 and labels.sum() == 10
    np.testing.assert_array_equal(utils.load_dataset(folder, "").y_train, labels)


def test_folders_that_are_no_data_set_are_refused_naming_what_is_wrong(tmp_path):
    def problem(change, named):
        shutil.rmtree(tmp_path / "pets", ignore_errors=True)
        change(folders(tmp_path / "pets", True))
        with pytest.raises(UserError, match=named) as error:
            utils.load_dataset(str(tmp_path / "pets"), "")
        one_line(error)

    problem(lambda root: shutil.rmtree(root / "train/dog"), "two classes or more")
    problem(lambda root: shutil.rmtree(root / "test"), "test/CLASS")
    problem(lambda root: (root / "test/cow").mkdir(), "a class without .*train/cow")
    problem(lambda root: (root / "train/cat/1.png").write_bytes(b"?"), "cannot be read as an image")
    problem(lambda root: Image.new("L", (9, 9)).save(root / "test/dog/1.png"),
            r"test/dog/1.png has 9×9 pixels, expected 4×6 like .*train/cat/0.png")
    problem(lambda root: [path.unlink() for path in root.glob("test/*/*.png")], "no images")


def test_a_damaged_note_in_an_image_and_a_name_of_strange_bytes_end_nothing(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")

    def damaged(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(utils.ImageOps, "exif_transpose", damaged)  # as it does for some WebP
        with pytest.raises(UserError, match="a.png cannot be read as an image"):
            utils.read_image(tmp_path / "a.png")
    name = os.fsdecode(b"\xe9.png")
    utils.write_csv(tmp_path / "a.csv", ["file"], [[name]])
    assert (tmp_path / "a.csv").read_bytes() == b"file\r\n\xe9.png\r\n"


def test_image_files_of_every_kind_become_bytes_grey_or_in_colour(tmp_path):
    grey = np.array([[0, 64, 128], [192, 255, 7]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "L.png")
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "RGB.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "I16.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "F.tiff")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "I.tiff")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "I257.tiff")
    Image.fromarray(grey).convert("P").save(tmp_path / "P.gif")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(utils.read_image(path), grey[..., None], str(path))
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(utils.read_image(tmp_path / "bits.png")[..., 0],
                                  255 * (grey > 100))
    for ink, ground in ([255, 200, 200], 0), ([90, 0, 0], 255):  # opaque, then transparent
        Image.fromarray(np.array([[[*ink, 255], [*ink, 0]]], np.uint8)).save(tmp_path / "RGBA.png")
        assert utils.read_image(tmp_path / "RGBA.png").tolist() == [[ink, [ground] * 3]]
    lying = Image.fromarray(grey)
    lying.getexif()[0x0112] = 6  # the camera was turned: a quarter clockwise puts it upright
    lying.save(tmp_path / "photo.png", exif=lying.getexif())
    np.testing.assert_array_equal(utils.read_image(tmp_path / "photo.png")[..., 0],
                                  np.rot90(grey, -1))
    for pixels in (grey.astype(np.float32), grey.astype(np.int32) - 1, grey.astype(np.int32) * 300):
        Image.fromarray(pixels).save(tmp_path / "wide.tiff")
        with pytest.raises(UserError, match=r"wide.tiff .*grey from -?\d+ to \d+, expected") as error:
            utils.read_image(tmp_path / "wide.tiff")
        one_line(error)
    for content in (b"", b"no image", (tmp_path / "RGB.png").read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.png cannot be read") as error:
            utils.read_image(tmp_path / "bad.png")
        one_line(error)


def test_a_matrix_of_many_classes_is_a_picture_of_bounded_size():
    for n in (41, 1000):
        picture = utils.save_confusion_matrix(None, np.eye(n, dtype=int), [str(i) for i in range(n)])
        assert max(picture.shape) < 3000


# ---------------------------------------------------------------- plans

LABELS = np.random.default_rng(1).integers(0, 10, 3000).astype(np.int32)


def same(plan, other):
    return all(np.array_equal(a, b) for a, b in zip(plan, other))


def test_validation_is_a_sixth_of_the_training_images_and_none_of_the_rest():
    for n in (6, 7, 1000, 60000):
        train, held_out = utils.split_validation(n, seed=3)
        assert len(held_out) == n // 6
        assert sorted([*train, *held_out]) == list(range(n))
        assert np.all(np.diff(train) > 0) and np.all(np.diff(held_out) > 0)
    assert len(utils.split_validation(60000, 0)[1]) == 10000


def test_the_seed_chooses_what_is_held_out():
    first, again, other = (utils.split_validation(600, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 5 < len(np.intersect1d(first, other)) < 40  # 17 expected of independent choices


def test_too_few_images_for_a_validation_set_are_refused():
    with pytest.raises(UserError, match="5 training images"):
        utils.split_validation(5, 0)


def test_streams_of_different_seeds_epochs_and_purposes_differ():
    triples = [(s, e, p) for s in (0, 1, 11, 2**70) for e in (0, 1, 11) for p in ("a", "b", "1/a")]
    draws = {utils.random_stream(*triple).bytes(16) for triple in triples}
    assert len(draws) == len(triples)
    same_draws = {utils.random_stream(np.int64(1), np.int32(0), "a").bytes(16) for _ in range(2)}
    assert same_draws == {utils.random_stream(1, 0, "a").bytes(16)}


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="-1"):
        utils.random_stream(-1, 0, "order")


@pytest.mark.parametrize("overlap", [False, True])
def test_every_training_image_comes_first_exactly_once_an_epoch(overlap):
    plan = utils.training_plan(LABELS, 0, 0, 2, overlap)
    k = 2 if overlap else 1
    assert plan.index.shape == (3000, k) and plan.shift.shape == (3000, k, 2)
    assert plan.index.dtype == plan.shift.dtype == np.int32
    assert np.array_equal(np.sort(plan.index[:, 0]), np.arange(3000))
    assert not np.array_equal(plan.index[:, 0], np.arange(3000))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_plan_is_a_function_of_seed_and_epoch_and_both_matter(overlap):
    plan = utils.training_plan(LABELS, 7, 4, 2, overlap)
    utils.training_plan(LABELS, 7, 5, 2, overlap)
    np.random.default_rng(0).random()
    assert same(plan, utils.training_plan(LABELS, 7, 4, 2, overlap))
    for seed, epoch in ((7, 5), (8, 4), (4, 7)):
        other = utils.training_plan(LABELS, seed, epoch, 2, overlap)
        assert not np.array_equal(plan.index, other.index)
        assert not np.array_equal(plan.shift, other.shift)


def test_batches_of_any_size_put_together_are_the_same_epoch():
    plan = utils.training_plan(LABELS, 0, 0, 2, True)
    for size in (1, 64, 999):
        batches = [
            (plan.index[i : i + size], plan.shift[i : i + size]) for i in range(0, 3000, size)
        ]
        assert same(plan, [np.concatenate(parts) for parts in zip(*batches)])


def digest_of_plans():
    plans = [utils.training_plan(LABELS, 5, 2, 4, True), utils.evaluation_plan(LABELS, 4, True)]
    arrays = [array for plan in plans for array in plan] + [*utils.split_validation(3000, 5)]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_another_process_makes_the_same_plans():
    code = "import test_utils; print(test_utils.digest_of_plans())"
    paths = os.pathsep.join(str(Path(file).parent) for file in (__file__, utils.__file__))
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
        digest = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert digest.strip() == digest_of_plans()


def test_shifts_cover_the_whole_range_evenly_for_each_image_and_axis():
    labels = np.zeros(50000, np.int32)
    for max_shift in (2, 4):
        shift = utils.training_plan(labels, 0, 0, max_shift, False).shift
        values = 2 * max_shift + 1
        # Rows and columns together: each of the values**2 shifts is as likely as any other.
        cell = (shift[:, 0, 0] + max_shift) * values + shift[:, 0, 1] + max_shift
        counts = np.bincount(cell, minlength=values**2)
        assert len(counts) == values**2
        assert chi_square(counts) < bound(values**2 - 1)
    assert not utils.training_plan(labels, 0, 0, 0, False).shift.any()


def test_a_shift_belongs_to_the_image_and_not_to_its_place_in_the_epoch():
    plan = utils.training_plan(LABELS, 0, 0, 2, True)
    by_image = np.empty_like(plan.shift)
    by_image[plan.index[:, 0]] = plan.shift
    expected = utils.random_stream(0, 0, "shift").integers(-2, 3, (3000, 2, 2), np.int32)
    np.testing.assert_array_equal(by_image, expected)


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


def bound(degrees):
    """Five standard deviations above the mean of chi-square."""
    return degrees + 5 * math.sqrt(2 * degrees)


def test_partners_are_never_of_the_same_class():
    for labels in (LABELS, np.array([0, 1]), np.array([7, 7, 7, 2, 9]), np.array([3] * 99 + [0])):
        for epoch in range(5):
            first, second = utils.training_plan(labels, 0, epoch, 4, True).index.T
            assert np.all(labels[first] != labels[second])


def test_partners_are_uniform_over_the_images_of_every_other_class():
    labels = np.array([2, 0, 5, 0, 2, 2, 9, 0])  # classes of unequal sizes, not in order
    counts = np.zeros((8, 8), int)
    for epoch in range(3000):
        np.add.at(counts, tuple(utils.training_plan(labels, 0, epoch, 0, True).index.T), 1)
    others = [labels != label for label in labels]
    assert not any(row[~other].any() for row, other in zip(counts, others))
    total = sum(chi_square(row[other]) for row, other in zip(counts, others))
    assert total < bound(sum(other.sum() - 1 for other in others))


def test_both_images_of_a_pair_have_shifts_of_their_own():
    shift = utils.training_plan(LABELS, 0, 0, 4, True).shift
    assert set(np.unique(shift[:, 1])) == set(range(-4, 5))
    assert np.all(abs(np.corrcoef(shift.reshape(3000, 4).T) - np.eye(4)) < 0.1)


@pytest.mark.parametrize("labels", [np.full(10, 4), np.array([], np.int32)])
def test_pairs_of_a_single_class_are_refused(labels):
    with pytest.raises(UserError, match="expected two"):
        utils.training_plan(labels, 0, 0, 4, True)
    with pytest.raises(UserError, match="expected two"):
        utils.evaluation_plan(labels, 4, True)


def test_single_digits_are_evaluated_in_order_and_unshifted():
    plan = utils.evaluation_plan(LABELS, 2, False)
    assert plan.index.dtype == plan.shift.dtype == np.int32
    assert np.array_equal(plan.index, np.arange(3000)[:, None])
    assert plan.shift.shape == (3000, 1, 2) and not plan.shift.any()


def test_evaluation_pairs_are_fixed_in_order_and_as_many_as_asked_for():
    for pairs in (1, 3):
        plan = utils.evaluation_plan(LABELS, 4, True, pairs)
        assert plan.index.dtype == plan.shift.dtype == np.int32
        assert same(plan, utils.evaluation_plan(LABELS, 4, True, pairs))
        assert np.array_equal(plan.index[:, 0], np.tile(np.arange(3000), pairs))
        assert same(plan.take(slice(3000)), utils.evaluation_plan(LABELS, 4, True))
        assert np.all(LABELS[plan.index[:, 0]] != LABELS[plan.index[:, 1]])
        assert plan.shift.shape == (3000 * pairs, 2, 2)
        assert (plan.shift.min(), plan.shift.max()) == (-4, 4)


# ---------------------------------------------------------------- pictures


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def has(picture, color):
    return bool((picture == color).all(-1).any())


def margins_are_white(picture):
    edges = picture[:20], picture[-20:], picture[:, :20], picture[:, -20:]
    return all((edge == 255).all() for edge in edges)


def test_the_grid_holds_every_pixel_in_its_place():
    for count, channels in ((1, 1), (5, 3), (9, 1)):
        images = np.random.default_rng(0).integers(0, 256, (count, 4, 6, channels), np.uint8)
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        grid = utils.image_grid(images)
        assert grid.dtype == np.uint8 and grid.shape == (rows * 5 - 1, columns * 7 - 1, channels)
        separators = np.ones(grid.shape[:2], bool)
        for i, image in enumerate(images):
            y, x = i // columns * 5, i % columns * 7
            np.testing.assert_array_equal(grid[y : y + 4, x : x + 6], image)
            separators[y : y + 4, x : x + 6] = False
        assert np.all(grid[separators] == 128)


@pytest.mark.filterwarnings("error")
def test_floats_are_clipped_and_rounded_to_bytes():
    image = np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, 100 / 255]).reshape(1, 1, 8, 1)
    expected = [0, 0, 128, 255, 255, 0, 255, 100]
    assert utils.image_grid(image).ravel().tolist() == expected
    assert utils.image_grid(image.astype(np.float32)).ravel().tolist() == expected


def test_a_saved_grid_is_the_grid_three_times_as_large(tmp_path, mnist):
    for images in (mnist.x_test[:10], np.repeat(mnist.x_test[:2], 3, -1)):
        utils.save_grid(tmp_path / "a.png", images)
        grid = np.broadcast_to(utils.image_grid(images), (*utils.image_grid(images).shape[:2], 3))
        np.testing.assert_array_equal(pixels(tmp_path / "a.png")[1::3, 1::3], grid)
        np.testing.assert_array_equal(pixels(tmp_path / "a.png")[::3, 2::3], grid)


def test_a_confusion_matrix_agrees_with_counting_one_by_one():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 7, (2, 500)).astype(np.int32)
    expected = np.zeros((7, 7), np.int64)
    for label, prediction in zip(labels, predictions):
        expected[label, prediction] += 1
    matrix = utils.confusion_matrix(labels, predictions, 7)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, expected)
    assert utils.confusion_matrix([], [], 3).shape == (3, 3)


def test_a_confusion_matrix_is_red_where_errors_are_and_grey_on_the_diagonal(tmp_path):
    right = np.diag(np.arange(900, 1000, 10))
    wrong = right.copy()
    wrong[2, 7] = 12
    for matrix in (right, wrong):
        for names in (DIGITS, utils.CLASS_NAMES["fashion_mnist"]):
            utils.save_confusion_matrix(tmp_path / "a.png", matrix, names)
            picture = pixels(tmp_path / "a.png")
            assert has(picture, RED) == (matrix is wrong)
            assert has(picture, (228, 230, 232)) and margins_are_white(picture)
    utils.save_confusion_matrix(tmp_path / "a.png", np.zeros((3, 3), int), "abc")


def test_reconstructions_show_their_triples_and_red_only_for_wrong_ones(tmp_path, mnist):
    images, labels = mnist.x_test[:30], mnist.y_test[:30]
    wrong = labels.copy()
    wrong[4] = (wrong[4] + 1) % 10
    for predictions in (labels, wrong):
        shown = images[:, None] / 255
        arguments = (images, shown, 1 - shown, labels[:, None], predictions[:, None], DIGITS)
        returned = utils.save_reconstructions(tmp_path / "a.png", *arguments)
        picture = pixels(tmp_path / "a.png")
        np.testing.assert_array_equal(returned, picture)
        np.testing.assert_array_equal(utils.save_reconstructions(None, *arguments), picture)
        assert has(picture, RED) == (predictions is wrong)
        assert margins_are_white(picture)
        for tile in (images[19], 255 - images[0]):  # the last shown, and an inverted reconstruction
            assert position(picture, tile)
        assert position(picture, images[20]) is None


def position(picture, tile):
    """Row and column where the picture has these pixels in grey, enlarged by 4; None if nowhere."""
    tile = tile.repeat(4, 0).repeat(4, 1).repeat(3, -1)
    height, width = tile.shape[:2]
    needle = tile[height // 2].tobytes()
    for y in range(picture.shape[0] - height + 1):
        x = picture[y + height // 2].tobytes().find(needle) // 3
        if x >= 0 and np.array_equal(picture[y : y + height, x : x + width], tile):
            return y, x
    return None


def test_pairs_are_spelled_in_order_and_red_only_if_a_digit_is_wrong(tmp_path):
    parts = np.zeros((1, 2, 28, 28, 1))
    parts[0, 0, :14], parts[0, 1, 7:21] = 0.7, 0.6
    both = np.concatenate([np.full((7, 28), 0.7), np.ones((7, 28)), np.full((7, 28), 0.6),
                           np.zeros((7, 28))])[..., None]
    np.testing.assert_allclose(utils.merge(parts)[0], both)
    for guess, wrong in (([7, 2], False), ([2, 7], False), ([2, 1], True)):
        picture = utils.save_reconstructions(
            None, both[None], parts, parts, np.array([[2, 7]]), np.array([guess]), DIGITS)
        assert has(picture, RED) == wrong
        assert position(picture, np.rint(both * 255).astype(np.uint8))


def test_misclassified_images_are_shown_up_to_64_and_none_is_a_picture_too(tmp_path, mnist):
    scores = np.random.default_rng(0).random((70, 10))
    sizes = []
    for count in (0, 3, 64, 70):
        images, labels = mnist.x_test[:count], mnist.y_test[:count]
        arguments = (images, np.arange(count), labels, (labels + 1) % 10, scores[:count], DIGITS)
        utils.save_misclassified(tmp_path / "a.png", *arguments)
        picture = pixels(tmp_path / "a.png")
        assert has(picture, RED) == (count > 0) and has(picture, (34, 34, 34))
        assert margins_are_white(picture)
        sizes.append(picture.shape)
    assert sizes[2] == sizes[3] and sizes[0] < sizes[1] < sizes[2]


def test_tweak_sheets_have_a_row_for_each_digit_or_dimension_and_a_column_for_each_step(tmp_path):
    images = np.random.default_rng(0).random((3, 5, 28, 28, 1))
    deltas = np.linspace(-0.25, 0.25, 5)
    utils.save_tweak(tmp_path / "a.png", images, deltas, 7, ("Ankle boot", "Bag", "Coat"))
    utils.save_tweak_overview(tmp_path / "b.png", images, deltas, "4")
    for name in ("a.png", "b.png"):
        picture = pixels(tmp_path / name)
        assert margins_are_white(picture)
        tiles = np.rint(images * 255).astype(np.uint8)
        top, left = position(picture, tiles[0, 0])
        for row, column in np.ndindex(3, 5):
            expected = top + row * (112 + 4), left + column * (112 + 4)
            assert position(picture, tiles[row, column]) == expected


def test_a_sweep_moves_every_dimension_of_every_digit_to_and_fro(tmp_path):
    dims, digits, steps = 3, 2, 4
    images = np.zeros((dims, digits, steps, 28, 28, 1))
    for index in np.ndindex(dims, digits, steps):
        images[index] = (1 + np.ravel_multi_index(index, images.shape[:3])) / 25
    utils.save_sweep(tmp_path / "a.gif", images, np.linspace(-0.25, 0.25, steps), ("3", "Bag"))
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.format == "GIF" and picture.info["loop"] == 0
        assert picture.n_frames == 6  # 0 1 2 3 2 1
        frames = []
        for number in range(6):
            picture.seek(number)
            frames.append(np.asarray(picture.convert("L")).astype(int))
    left = 18 + (math.ceil(utils._text_width(["Bag"], True)) + 16) // 2
    top = 18 + 3 * 14 + 16
    for frame, step in zip(frames, (0, 1, 2, 3, 2, 1)):
        for dim, digit in np.ndindex(dims, digits):
            middle = frame[top + digit * 58 + 28, left + dim * 58 + 28]
            assert abs(middle - 255 * images[dim, digit, step, 0, 0, 0]) <= 4  # of 64 colours


def test_learning_curves_are_drawn_where_loss_and_error_are(tmp_path):
    steps = np.arange(1, 1001)
    loss, accuracy = 0.5 * np.exp(-steps / 300), 1 - 0.4 * np.exp(-steps / 300)
    train = {"loss/total": (steps, loss), "accuracy": (steps, accuracy)}
    every = slice(99, None, 100)
    validation = {tag: (s[every], v[every]) for tag, (s, v) in train.items()}
    blue, red = np.array((32, 99, 155)), np.array((192, 57, 43))
    for curves in ({"train": train}, {"train": train, "validation": validation},
                   {"train": {tag: (s[:1], v[:1]) for tag, (s, v) in train.items()}}):
        utils.save_learning_curves(tmp_path / "a.png", curves, 100)
        picture = pixels(tmp_path / "a.png")
        assert picture.shape == (560, 1400, 3)
        for half in (picture[:, :700], picture[:, 700:]):
            near = [(abs(half.astype(int) - color).sum(-1) < 40) for color in (blue, red)]
            assert near[0].any() and near[1].any() == ("validation" in curves)
        if len(curves) == 2:  # an exponential is a straight line here; the right half has no legend
            y, x = np.nonzero(near[0][60:] | near[1][60:])
            slope, offset = np.polyfit(x, y, 1)
            assert slope > 0.2 and np.abs(slope * x + offset - y).max() < 12


def test_steps_without_any_error_leave_a_gap_in_the_curve(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(utils, "save_figure", lambda path, figure: drawn.append(figure))
    accuracy = np.where(np.arange(240) // 3 % 2, 1.0, 0.8)  # in parts of three steps
    curve = {"loss/total": (np.arange(1, 241), np.ones(240)), "accuracy": (np.arange(1, 241), accuracy)}
    utils.save_learning_curves("", {"train": curve}, 60)
    (line,) = drawn[0].axes[1].lines
    np.testing.assert_allclose(line.get_xdata(), np.arange(2, 241, 3) / 60)
    np.testing.assert_allclose(line.get_ydata(), [20, np.nan] * 40)


def test_overlapping_reconstructions_are_red_and_green_and_yellow_where_both_are(tmp_path):
    inputs = np.zeros((2, 36, 36, 1))
    reconstructions = np.zeros((2, 2, 36, 36, 1))
    reconstructions[:, 0, :20], reconstructions[:, 1, 10:] = 1, 1
    labels = np.array([[2, 7], [3, 1]])
    for predictions, wrong in (([[7, 2], [3, 1]], False), ([[7, 2], [3, 3]], True)):
        for names in (DIGITS, utils.CLASS_NAMES["fashion_mnist"]):
            arguments = (inputs, reconstructions, labels, np.array(predictions), names)
            utils.save_multi(tmp_path / "a.png", "Pairs", *arguments)
            picture = pixels(tmp_path / "a.png")
            assert has(picture, RED) == wrong
            count = {c: (picture == c).all(-1).sum() for c in ((255, 0, 0), (0, 255, 0))}
            area = 36 * 9 * 2 * 3 * 3  # of a row of pixels in both examples, enlarged
            # Red: the part above the overlap, and the first one alone. Green: likewise below.
            assert list(count.values()) == [(10 + 20) * area // 9, (16 + 26) * area // 9]
            assert (picture == (255, 255, 0)).all(-1).sum() == 10 * area // 9
            assert margins_are_white(picture)


def test_long_class_names_are_cut_rather_than_written_over_each_other(tmp_path, mnist):
    names = [f"a class with a very long name, number {i}, and more of it" for i in range(10)]
    images, labels = mnist.x_test[:5], mnist.y_test[:5]
    several = images[:, None] / 255, images[:, None] / 255, labels[:, None], labels[:, None]
    utils.save_reconstructions(tmp_path / "a.png", images, *several, names)
    picture = pixels(tmp_path / "a.png")
    captions = picture[36 + 3 * 28 + 32 : 36 + 3 * 28 + 32 + 28]  # the line above the top row
    between = (captions == 255).all((0, 2))
    tile_widths = 3 * 112 + 2 * 4
    for gap in range(3):  # some white stays in the middle between neighbours
        assert between[36 + (gap + 1) * (tile_widths + 60) - 30 - 2 :][:4].all()


def test_no_picture_needs_a_display_or_pyplot(tmp_path):
    code = (
        "import sys, numpy, utils\n"
        "assert 'matplotlib' not in sys.modules\n"
        "utils.save_tweak_overview(sys.argv[1], numpy.zeros((2, 2, 8, 8, 3)), (0, 1), 'x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    subprocess.run(arguments, cwd=Path(utils.__file__).parent, check=True)
    assert margins_are_white(pixels(tmp_path / "a.png"))


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        utils.save_grid(tmp_path / "file" / "a.png", np.zeros((1, 2, 2, 1)))
