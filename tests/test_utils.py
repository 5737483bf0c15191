import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import statistics
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
from errors import DataFileError, UserError

DATA = Path(__file__).parent.parent / "data"


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


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_written_atomically_has_its_content_and_leaves_no_other_file(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with utils.atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        temporary.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert os.listdir(target.parent) == ["a.txt"]


def test_an_open_reader_keeps_reading_the_old_file_while_a_new_one_replaces_it(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with open(target) as reader:
        utils.write_json(target, "new")
        assert reader.read() == "old"
    assert json.loads(target.read_text()) == "new"


def write_text(path):
    with utils.atomic_path(path) as temporary:
        temporary.write_text("x" * 100_000)


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        lambda path: utils.write_json(path, [1, 2]),
        lambda path: utils.write_csv(path, ["a"], [[1], [2]]),
    ],
    ids=["text", "json", "csv"],
)
def test_the_whole_file_is_synced_to_disk_before_it_takes_its_name(tmp_path, monkeypatch, write):
    calls = []

    def fsync(descriptor, real=os.fsync):
        real(descriptor)
        status = os.fstat(descriptor)
        calls.append(("fsync", status.st_ino, status.st_size))

    def replace(source, place, real=os.replace):
        status = os.stat(source)
        calls.append(("replace", status.st_ino, status.st_size))
        real(source, place)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "a")
    status = os.stat(tmp_path / "a")
    whole_file = status.st_ino, status.st_size
    assert calls == [("fsync", *whole_file), ("replace", *whole_file)]


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


def test_a_csv_file_has_its_header_and_rows_whatever_is_in_the_cells(tmp_path):
    rows = [["plain", "1"], ['with "quotes", and commas', "2"], ["two\nlines", "é"]]
    utils.write_csv(tmp_path / "a.csv", ["text", "value"], rows)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["text", "value"], *rows]


def test_a_file_name_that_is_not_valid_utf8_keeps_its_bytes_in_a_csv_file(tmp_path):
    utils.write_csv(tmp_path / "a.csv", ["file"], [[os.fsdecode(b"\xe9.png")]])
    assert (tmp_path / "a.csv").read_bytes() == b"file\r\n\xe9.png\r\n"


def test_a_markdown_table_has_a_rule_below_its_header():
    lines = utils.markdown_table(["flag", "value"], [["epoch", 10], ["test", True]])
    assert lines == ["| flag | value |", "| --- | --- |", "| epoch | 10 |", "| test | True |"]


@pytest.mark.filterwarnings("error")
def test_floats_are_clipped_and_rounded_to_bytes():
    image = np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, 100 / 255])
    expected = [0, 0, 128, 255, 255, 0, 255, 100]
    for floats in (image, image.astype(np.float32)):
        converted = utils.to_uint8(floats)
        assert converted.dtype == np.uint8 and converted.tolist() == expected
    assert utils.to_uint8(np.array([0, 1, 200], np.uint8)).tolist() == [0, 1, 200]


# --- Random numbers -------------------------------------------------------------------------------


def test_streams_of_different_seeds_epochs_and_purposes_differ():
    triples = [(s, e, p) for s in (0, 1, 11, 2**70) for e in (0, 1, 11) for p in ("a", "b", "1/a")]
    draws = {utils.random_stream(*triple).bytes(16) for triple in triples}
    assert len(draws) == len(triples)


def test_a_stream_is_the_same_whatever_integers_its_seed_and_epoch_are():
    draws = {utils.random_stream(np.int64(1), np.int32(0), "a").bytes(16) for _ in range(2)}
    assert draws == {utils.random_stream(1, 0, "a").bytes(16)}


def test_a_stream_is_philox_keyed_by_the_hash_of_seed_epoch_and_purpose():
    # Trainings of earlier versions were drawn from these numbers, and are resumed from them.
    words = np.frombuffer(hashlib.blake2b(b"5/2/order", digest_size=16).digest(), "<u8")
    expected = np.random.Generator(np.random.Philox(key=words)).permutation(1000)
    np.testing.assert_array_equal(utils.random_stream(5, 2, "order").permutation(1000), expected)


def test_another_process_draws_the_same_numbers():
    code = "import utils; print(utils.random_stream(5, 2, 'order').bytes(16).hex())"
    drawn = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            cwd=DATA.parent,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            text=True,
        ).strip()
        for hash_seed in ("1", "2")
    }
    assert drawn == {utils.random_stream(5, 2, "order").bytes(16).hex()}


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="-1, expected 0 or more"):
        utils.random_stream(-1, 0, "order")


# --- IDX files ------------------------------------------------------------------------------------


def test_an_idx_file_is_read_back_as_the_bytes_written(tmp_path):
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
    "more than deflate can hold": (
        gzip.compress(idx_bytes(IMAGES, counts=(1000, 100, 10))),
        "its header claims 1,000,000 bytes, at most",
    ),
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
    with pytest.raises(DataFileError) as caught:
        utils.read_idx(tmp_path / "a.gz", "kmnist")
    assert one_line(caught).startswith(f"{tmp_path / 'a.gz'}: ") and reason in one_line(caught)
    error = caught.value
    assert (error.place, error.dataset) == (tmp_path / "a.gz", "kmnist")
    assert reason in str(error.problem)


def test_trailing_bytes_and_checksums_are_noticed_where_a_chunk_ends_too(tmp_path):
    content = idx_bytes(np.zeros(2**20, np.uint8))
    assert len(utils.read_idx(write_gz(tmp_path / "a.gz", content))) == 2**20
    with pytest.raises(DataFileError, match="holds more"):
        utils.read_idx(write_gz(tmp_path / "a.gz", content + b"\0"))
    squeezed = bytearray(gzip.compress(content))
    squeezed[-8] ^= 1
    (tmp_path / "a.gz").write_bytes(squeezed)
    with pytest.raises(DataFileError, match="CRC check failed"):
        utils.read_idx(tmp_path / "a.gz")


def test_a_pipe_a_folder_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for name, reason in (("", "regular"), ("pipe", "regular"), ("absent", "No such file")):
        with pytest.raises(DataFileError, match=reason) as caught:
            utils.read_idx(tmp_path / name)
        assert (caught.value.place, caught.value.dataset) == (tmp_path / name, None)


def test_a_gzip_bomb_is_read_no_further_than_its_header_announces(tmp_path):
    squeeze = zlib.compressobj(9, wbits=31)
    zeros = bytes(2**20)
    bomb = squeeze.compress(struct.pack(">HBBi", 0, 8, 1, 100))
    bomb += b"".join(squeeze.compress(zeros) for _ in range(64)) + squeeze.flush()
    (tmp_path / "bomb.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(DataFileError, match="holds more"):
        utils.read_idx(tmp_path / "bomb.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < 64 * len(zeros)


def test_a_header_that_claims_gigabytes_costs_no_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8)
    for claim, reason in ((2**30, "holds only"), (2**30 + 1, "are possible")):
        write_gz(tmp_path / "a.gz", idx_bytes(noise, counts=(claim,)))
        tracemalloc.start()
        with pytest.raises(DataFileError, match=f"header claims .*{reason}"):
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
        except DataFileError:
            outcomes["refused"] += 1
        else:
            assert array.dtype == np.uint8 and array.size in (len(content) - 8, 60)
            outcomes["read"] += 1
    assert min(outcomes.values()) >= 20


# --- Data sets ------------------------------------------------------------------------------------


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


def test_a_missing_file_is_an_error_with_the_data_set_that_it_belongs_to(tmp_path):
    with pytest.raises(DataFileError, match="No such file") as caught:
        utils.load_dataset("kmnist", tmp_path)
    one_line(caught)
    assert caught.value.place == tmp_path / "kmnist" / "train-images-idx3-ubyte.gz"
    assert caught.value.dataset == "kmnist"


def test_the_error_of_an_unknown_data_set_lists_the_known_ones(tmp_path):
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
    with pytest.raises(DataFileError, match=reason) as caught:
        utils.load_dataset("mnist", tmp_path)
    one_line(caught)
    assert (caught.value.place, caught.value.dataset) == (tmp_path / "mnist", "mnist")


# --- Data sets of the user ------------------------------------------------------------------------

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
        data = utils.load_dataset(str(tmp_path / f"{name}.npz"), "nowhere")
        assert data.name == name and data.class_names == ("0", "1", "2")
        assert data.x_train.dtype == np.uint8 and data.y_train.dtype == np.int32
        expected = RAMP[..., :1] if name == "grey" else RAMP
        np.testing.assert_array_equal(data.x_train, expected)
        np.testing.assert_array_equal(data.x_test, expected[:2] // (1 if name == "grey" else 2))
        assert data.y_test.tolist() == [2, 1]


@pytest.mark.parametrize(
    "changes, named",
    [
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
    ],
)
def test_an_npz_file_with_wrong_arrays_is_refused_in_one_line(tmp_path, changes, named):
    np.savez(tmp_path / "a.npz", **colour_arrays(**changes))
    with pytest.raises(UserError, match=named) as error:
        utils.load_dataset(str(tmp_path / "a.npz"), "")
    assert "a.npz" in one_line(error)


def test_thousands_of_float_images_are_converted_one_by_one_to_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2500, 2, 3), np.uint8)
    arrays = {"x_train": images / 255, "y_train": np.arange(2500) % 2}
    arrays |= {"x_test": images[:1001] / 255, "y_test": np.zeros(1001, int)}
    np.savez(tmp_path / "a.npz", **arrays)
    data = utils.load_dataset(str(tmp_path / "a.npz"), "")
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
            utils.load_dataset(str(tmp_path / f"{name}.npz"), "")
        assert "expected" in one_line(error) or "does not exist" in one_line(error)


def folders(root, colour, train=3):
    """A folder of images by class, cats and dogs of 6×4 pixels, and files to be ignored."""
    for split, count in (("train", train), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                value = 100 * label + 10 * number + (split == "test")
                pixels = np.full((6, 4, 3), value, np.uint8)
                pixels[..., 0] += 50 * (colour and name == "dog")
                Image.fromarray(pixels).save(place / f"{number}.{'PNG' if number == 2 else 'png'}")
            (place / "notes.txt").write_text("no image")
        (root / split / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("colour", [False, True])
def test_a_folder_of_images_by_class_is_a_data_set(tmp_path, colour):
    data = utils.load_dataset(str(folders(tmp_path / "pets", colour)), "nowhere")
    assert data.name == "pets" and data.class_names == ("cat", "dog")
    assert data.x_train.shape == (6, 6, 4, 3 if colour else 1) and data.x_test.shape[0] == 4
    train = sorted(zip(data.x_train[:, 0, 0, -1].tolist(), data.y_train.tolist(), strict=True))
    assert train == [(0, 0), (10, 0), (20, 0), (100, 1), (110, 1), (120, 1)]
    test = sorted(zip(data.x_test[:, 5, 3, 0].tolist(), data.y_test.tolist(), strict=True))
    red = 150 if colour else 100
    assert test == [(1, 0), (11, 0), (red + 1, 1), (red + 11, 1)]


def test_the_classes_of_a_folder_are_mixed_the_same_way_each_time(tmp_path):
    folder = str(folders(tmp_path / "pets", False, train=10))
    labels = utils.load_dataset(folder, "").y_train
    assert 2 <= labels[:10].sum() <= 8 and labels.sum() == 10
    order = utils.random_stream(0, 0, "folder train").permutation(20)
    assert labels.tolist() == [int(position >= 10) for position in order]
    np.testing.assert_array_equal(utils.load_dataset(folder, "").y_train, labels)


def test_a_folder_that_is_no_data_set_is_refused_with_what_is_wrong(tmp_path):
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
    problem(
        lambda root: Image.new("L", (9, 9)).save(root / "test/dog/1.png"),
        r"test/dog/1.png has 9×9 pixels, expected 4×6 like .*train/cat/0.png",
    )
    problem(lambda root: [path.unlink() for path in root.glob("test/*/*.png")], "no images")


# --- Images ---------------------------------------------------------------------------------------

GREY = np.array([[0, 64, 128], [192, 255, 7]], np.uint8)


@pytest.mark.parametrize(
    "name, image",
    [
        ("L.png", Image.fromarray(GREY)),
        ("RGB.png", Image.fromarray(np.stack([GREY] * 3, -1))),
        ("I16.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("F.tiff", Image.fromarray(GREY.astype(np.float32) / 255)),
        ("I.tiff", Image.fromarray(GREY.astype(np.int32))),
        ("I257.tiff", Image.fromarray(GREY.astype(np.int32) * 257)),
        ("P.gif", Image.fromarray(GREY).convert("P")),
        ("LA.png", Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (3, 2), 255)])),
    ],
)
def test_grey_images_of_every_kind_become_the_same_bytes(tmp_path, name, image):
    image.save(tmp_path / name)
    pixels = utils.read_image(tmp_path / name)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, GREY[..., None])


def test_black_and_white_bits_become_0_and_255(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "bits.png")
    pixels = utils.read_image(tmp_path / "bits.png")
    assert pixels[..., 0].tolist() == [[0, 0, 255], [255, 255, 0]]


def test_sixteen_bits_are_scaled_by_their_own_range_however_dark_the_image_is(tmp_path):
    Image.fromarray(np.array([[0, 129, 255]], np.uint16)).save(tmp_path / "dark.png")
    assert utils.read_image(tmp_path / "dark.png").ravel().tolist() == [0, 1, 1]


def test_one_coloured_pixel_makes_an_image_one_in_colour(tmp_path):
    pixels = np.stack([GREY] * 3, -1)
    pixels[1, 2] = 7, 8, 7
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(utils.read_image(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda image: image),
        (2, np.fliplr),
        (3, lambda image: np.rot90(image, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda image: np.rot90(image, -1)),
        (7, lambda image: np.rot90(image, 2).T),
        (8, np.rot90),
    ],
)
def test_a_photograph_is_turned_upright(tmp_path, orientation, upright):
    image = Image.fromarray(GREY)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(utils.read_image(tmp_path / "photo.png")[..., 0], upright(GREY))


@pytest.mark.parametrize(
    "pixels, expected",
    [
        # Opaque ink, and the same ink where nothing of it is visible.
        ([[255, 200, 200, 255], [255, 200, 200, 0]], [[255, 200, 200], [0, 0, 0]]),
        ([[90, 0, 0, 255], [90, 0, 0, 0]], [[90, 0, 0], [255, 255, 255]]),
        # Only what is visible decides whether the ink is dark.
        (
            [[90, 0, 0, 255], [255, 255, 255, 0], [255, 255, 255, 0]],
            [[90, 0, 0], [255, 255, 255], [255, 255, 255]],
        ),
        # A fifth of black ink on white, and of light ink on black.
        ([[0, 0, 0, 51], [60, 0, 0, 255]], [[204, 204, 204], [60, 0, 0]]),
        ([[255, 255, 255, 51], [250, 255, 255, 255]], [[51, 51, 51], [250, 255, 255]]),
    ],
)
def test_transparency_becomes_white_behind_dark_ink_and_black_behind_light_ink(
    tmp_path, pixels, expected
):
    Image.fromarray(np.array([pixels], np.uint8)).save(tmp_path / "a.png")
    assert utils.read_image(tmp_path / "a.png").tolist() == [expected]


def test_a_transparent_colour_of_a_palette_is_transparent_too(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    expected = [[[10, 20, 30], [255] * 3, [255] * 3]]
    assert utils.read_image(tmp_path / "a.png").tolist() == expected


@pytest.mark.parametrize(
    "pixels", [GREY.astype(np.float32), GREY.astype(np.int32) - 1, GREY.astype(np.int32) * 300]
)
def test_grey_out_of_every_known_range_is_refused_with_its_range(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "wide.tiff")
    span = f"grey from {pixels.min():g} to {pixels.max():g}, expected"
    with pytest.raises(UserError, match=f"wide.tiff .*{span}") as error:
        utils.read_image(tmp_path / "wide.tiff")
    one_line(error)


def test_what_is_no_whole_image_is_refused_naming_the_file(tmp_path):
    Image.fromarray(np.stack([GREY] * 3, -1)).save(tmp_path / "good.png")
    for content in (b"", b"no image", (tmp_path / "good.png").read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.png cannot be read") as error:
            utils.read_image(tmp_path / "bad.png")
        one_line(error)


def test_damaged_exif_data_are_an_error_in_one_line(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")

    def damaged(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(utils.ImageOps, "exif_transpose", damaged)  # as for some WebP files
    with pytest.raises(UserError, match="a.png cannot be read as an image") as error:
        utils.read_image(tmp_path / "a.png")
    one_line(error)


def edge_pixels(image):
    """The pixels of the four sides, one by one; a corner belongs to two sides."""
    height, width = image.shape[:2]
    for x in range(width):
        yield from (image[0, x], image[height - 1, x])
    for y in range(height):
        yield from (image[y, 0], image[y, width - 1])


def test_an_image_is_dark_on_light_if_the_median_of_its_edge_is_above_mid_grey():
    dice = np.random.default_rng(0)
    answers = set()
    for trial in range(200):
        shape = (*dice.integers(1, 7, 2), dice.choice([1, 3]))
        image = dice.choice([90, 120, 127, 128, 135, 165], shape).astype(np.uint8)
        medians = [
            statistics.median(map(int, side)) for side in zip(*edge_pixels(image), strict=True)
        ]
        expected = sum(medians) / len(medians) > 127.5
        assert utils.is_dark_on_light(image) is expected, trial
        answers.add(expected)
    assert answers == {True, False}


def test_the_inside_of_an_image_does_not_decide_whether_it_is_dark_on_light():
    image = np.full((9, 9, 1), 255, np.uint8)
    image[1:-1, 1:-1] = 0
    assert utils.is_dark_on_light(image) and not utils.is_dark_on_light(255 - image)


@pytest.mark.parametrize("darkest, brightest", [(0, 255), (0, 40), (215, 255)])
def test_an_image_of_the_right_shape_stays_as_it_was(darkest, brightest):
    for channels in (1, 3):
        dice = np.random.default_rng(0)
        image = dice.integers(darkest, brightest + 1, (6, 4, channels), np.uint8)
        fitted, done = utils.fit_image(image, image.shape, inverted=False)
        assert done == "as it was"
        np.testing.assert_array_equal(fitted, image)


def test_an_inverted_image_has_light_and_dark_swapped_and_says_so():
    image = np.arange(24, dtype=np.uint8).reshape(6, 4, 1) * 10
    fitted, done = utils.fit_image(image, image.shape, inverted=True)
    assert done == "inverted" and fitted.dtype == np.uint8
    assert fitted.tolist() == [[[255 - value] for [value] in row] for row in image.tolist()]


def test_colours_become_the_grey_of_their_luma():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    fitted, done = utils.fit_image(image, (6, 4, 1), inverted=False)
    assert done == "made grey"
    expected = image @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    np.testing.assert_allclose(fitted[..., 0], expected, atol=0.51)


def test_grey_becomes_three_equal_colours_which_is_no_change_to_speak_of():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 1), np.uint8)
    fitted, done = utils.fit_image(image, (6, 4, 3), inverted=False)
    assert done == "as it was" and fitted.shape == (6, 4, 3)
    for channel in range(3):
        np.testing.assert_array_equal(fitted[..., channel], image[..., 0])


PAPER, INK = (10, 40, 90), (250, 200, 140)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_other_proportions_is_padded_with_its_edge_colour_and_resized(
    channels, upright, inverted
):
    image = np.tile(np.array(PAPER[:channels], np.uint8), (120, 240, 1))
    image[36:84, 72:168] = INK[:channels]
    expected = np.tile(np.array(PAPER[:channels]), (40, 40, 1))  # a sixth of 240×120, in the middle
    expected[10 + 6 : 10 + 14, 12:28] = INK[:channels]
    if upright:
        image, expected = image.swapaxes(0, 1), expected.swapaxes(0, 1)
    if inverted:
        expected = 255 - expected
    fitted, done = utils.fit_image(image, (40, 40, channels), inverted)
    size = "120×240" if upright else "240×120"
    changes = ["inverted"] * inverted + ["filled up at its edges", f"resized from {size}"]
    assert done == ", ".join(changes)
    assert fitted.dtype == np.uint8 and fitted.shape == expected.shape
    middle = (np.array(PAPER[:channels]) + INK[:channels]) / 2
    middle = 255 - middle if inverted else middle
    np.testing.assert_array_equal(fitted > middle, expected > middle)
    plain = np.ones((40, 40), bool)  # Lanczos blurs three pixels on both sides of an edge
    plain[13:27, 9:31] = False
    plain[19:21, 15:25] = True
    plain = plain.T if upright else plain
    np.testing.assert_array_equal(fitted[plain], expected[plain])


def test_an_image_of_the_same_proportions_is_resized_without_padding():
    image = np.full((56, 28, 1), 99, np.uint8)
    fitted, done = utils.fit_image(image, (28, 14, 1), inverted=False)
    assert done == "resized from 28×56"
    np.testing.assert_array_equal(fitted, np.full((28, 14, 1), 99))


def test_the_changes_of_an_image_are_named_in_the_order_in_which_they_are_made():
    image = np.full((10, 30, 3), 20, np.uint8)
    fitted, done = utils.fit_image(image, (5, 5, 1), inverted=True)
    assert done == "made grey, inverted, filled up at its edges, resized from 30×10"
    np.testing.assert_array_equal(fitted, np.full((5, 5, 1), 235))


def test_padding_has_the_colour_of_most_of_the_edge():
    image = np.full((8, 16, 1), 30, np.uint8)
    image[:, :2] = 240  # a stain at the left edge
    fitted, _ = utils.fit_image(image, (16, 16, 1), inverted=False)
    np.testing.assert_array_equal(fitted[[0, 3, 12, 15]], 30)
    np.testing.assert_array_equal(fitted[4:12, 0], 240)  # the image itself keeps its size


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a b/ü 猫 \u3000", "a b/ü 猫 \u3000"),
        (os.fsdecode(b"a\xff\xfe"), "a\\xff\\xfe"),
        ("a\nb\tc\x1b[31m\x7f", "a\\nb\\tc\\x1b[31m\\x7f"),
        ("\u2028\u200d", "\\u2028\u200d"),  # the second joins letters and emoji
    ],
)
def test_a_name_is_shown_without_controls_and_bytes_that_are_no_text(name, shown):
    assert utils.printable(name) == shown


def test_classes_and_data_sets_are_named_so_that_every_file_can_hold_the_names(tmp_path):
    folder = tmp_path / os.fsdecode(b"set\xff")
    for split, name in itertools.product(("train", "test"), (b"\xfe", "猫".encode())):
        (folder / split / os.fsdecode(name)).mkdir(parents=True)
        Image.new("L", (20, 20)).save(folder / split / os.fsdecode(name) / "1.png")
    dataset = utils.load_dataset(str(folder), "")
    assert dataset.name == "set\\xff" and set(dataset.class_names) == {"\\xfe", "猫"}


def test_a_data_set_has_the_name_that_is_known_without_loading_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((4, 5, 5), np.uint8), np.arange(4) % 2
    np.savez("own.v1.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for split, name in itertools.product(("train", "test"), "ab"):
        path = Path("pics.npz", split, name, "1.png")
        path.parent.mkdir(parents=True)
        Image.fromarray(images[0]).save(path)
    monkeypatch.chdir("pics.npz/train")
    for path, name in ("../../own.v1.npz", "own.v1"), ("../../pics.npz", "pics.npz"):
        assert utils.dataset_name(path) == utils.load_dataset(path, None).name == name
    assert utils.dataset_name("..") == utils.load_dataset("..", None).name == "pics.npz"
    assert utils.dataset_name("kmnist") == "kmnist"
