import gzip
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from capsnet_core.errors import DataFileError, UserError
from inputs import datasets
from inputs.readers import idx

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def mnist():
    return datasets.load_dataset("mnist", DATA)


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


# --- IDX files ------------------------------------------------------------------------------------


def test_an_idx_file_is_read_back_as_the_bytes_written(tmp_path):
    for shape in ((7,), (3, 5, 4), (1, 1, 1)):
        array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        read = idx.read_idx(write_gz(tmp_path / "a.gz", idx_bytes(array)))
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
        idx.read_idx(tmp_path / "a.gz", "kmnist")
    assert one_line(caught).startswith(f"{tmp_path / 'a.gz'}: ") and reason in one_line(caught)
    error = caught.value
    assert (error.place, error.dataset) == (tmp_path / "a.gz", "kmnist")
    assert reason in str(error.problem)


def test_trailing_bytes_and_checksums_are_noticed_where_a_chunk_ends_too(tmp_path):
    content = idx_bytes(np.zeros(2**20, np.uint8))
    assert len(idx.read_idx(write_gz(tmp_path / "a.gz", content))) == 2**20
    with pytest.raises(DataFileError, match="holds more"):
        idx.read_idx(write_gz(tmp_path / "a.gz", content + b"\0"))
    squeezed = bytearray(gzip.compress(content))
    squeezed[-8] ^= 1
    (tmp_path / "a.gz").write_bytes(squeezed)
    with pytest.raises(DataFileError, match="CRC check failed"):
        idx.read_idx(tmp_path / "a.gz")


def test_a_pipe_a_folder_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for name, reason in (("", "regular"), ("pipe", "regular"), ("absent", "No such file")):
        with pytest.raises(DataFileError, match=reason) as caught:
            idx.read_idx(tmp_path / name)
        assert (caught.value.place, caught.value.dataset) == (tmp_path / name, None)


def test_a_gzip_bomb_is_read_no_further_than_its_header_announces(tmp_path):
    squeeze = zlib.compressobj(9, wbits=31)
    zeros = bytes(2**20)
    bomb = squeeze.compress(struct.pack(">HBBi", 0, 8, 1, 100))
    bomb += b"".join(squeeze.compress(zeros) for _ in range(64)) + squeeze.flush()
    (tmp_path / "bomb.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(DataFileError, match="holds more"):
        idx.read_idx(tmp_path / "bomb.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < 64 * len(zeros)


def test_a_header_that_claims_gigabytes_costs_no_memory(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8)
    for claim, reason in ((2**30, "holds only"), (2**30 + 1, "are possible")):
        write_gz(tmp_path / "a.gz", idx_bytes(noise, counts=(claim,)))
        tracemalloc.start()
        with pytest.raises(DataFileError, match=f"header claims .*{reason}"):
            idx.read_idx(tmp_path / "a.gz")
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
            array = idx.read_idx(path)
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
        data = datasets.load_dataset(name, tmp_path)
        assert data.name == name and len(data.class_names) == 10
        assert (data.class_names[0], data.class_names[-1]) == (first, last)
        assert data.x_train.shape == (12, 5, 4, 1) and data.y_train.tolist()[-2:] == [0, 1]
        assert data.x_test[1, 0, :, 0].tolist() == [20, 21, 22, 23]
    assert " ".join(datasets.CLASS_NAMES["kmnist"]) == "o ki su tsu na ha ma ya re wo"


def test_a_missing_file_is_an_error_with_the_data_set_that_it_belongs_to(tmp_path):
    with pytest.raises(DataFileError, match="No such file") as caught:
        datasets.load_dataset("kmnist", tmp_path)
    one_line(caught)
    assert caught.value.place == tmp_path / "kmnist" / "train-images-idx3-ubyte.gz"
    assert caught.value.dataset == "kmnist"


def test_the_error_of_an_unknown_data_set_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="mnist, fashion_mnist, kmnist") as error:
        datasets.load_dataset("mnits\n", tmp_path)
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
        datasets.load_dataset("mnist", tmp_path)
    one_line(caught)
    assert (caught.value.place, caught.value.dataset) == (tmp_path / "mnist", "mnist")


@pytest.mark.parametrize("dot", [False, True])
def test_files_that_are_already_unpacked_are_read_as_well(tmp_path, dot):
    write_dataset(tmp_path / "packed" / "mnist")
    expected = datasets.load_dataset("mnist", tmp_path / "packed")
    folder = tmp_path / "unpacked" / "mnist"
    folder.mkdir(parents=True)
    for path in (tmp_path / "packed" / "mnist").iterdir():
        name = path.stem.replace("-idx", ".idx") if dot else path.stem
        (folder / name).write_bytes(gzip.decompress(path.read_bytes()))
    data = datasets.load_dataset("mnist", tmp_path / "unpacked")
    for array, other in zip(data[1:5], expected[1:5], strict=True):
        np.testing.assert_array_equal(array, other)


def test_an_unpacked_file_that_claims_more_than_it_can_hold_is_refused(tmp_path):
    (tmp_path / "a-ubyte").write_bytes(idx_bytes(IMAGES, counts=(30, 5, 4)))
    with pytest.raises(DataFileError, match="claims 600 bytes, at most 76 are possible"):
        idx.read_idx(tmp_path / "a-ubyte")
    for content, reason in (GOOD[:-1], "holds only 59"), (GOOD + b"?", "holds more"):
        (tmp_path / "a-ubyte").write_bytes(content)
        with pytest.raises(DataFileError, match=reason):
            idx.read_idx(tmp_path / "a-ubyte")
    (tmp_path / "a-ubyte").write_bytes(GOOD)
    np.testing.assert_array_equal(idx.read_idx(tmp_path / "a-ubyte"), IMAGES)
