"""IDX files: the form of MNIST and of the data sets that replace it."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from capsnet_core import config
from capsnet_core.errors import DataFileError
from inputs.readers.dataset import Dataset

_MAX_IDX_BYTES = 2**30  # 20 times MNIST's training images
_MAX_EXPANSION = 1032  # limit of deflate: at best two bits for a run of 258 bytes


def read_idx(path, dataset=None):
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Hostile files do no harm: memory grows with the data in the file, not with what the header
    claims, and reading stops one byte after the claim. Source of the format:
    http://yann.lecun.com/exdb/mnist/.

    Returns:
        uint8 (N,) or (N, H, W), no dimension zero.

    Raises:
        DataFileError: the file, of this data set, cannot be read, or does not hold what it claims.
    """
    gzipped = Path(path).suffix == ".gz"
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path):  # a pipe would block
            raise DataFileError(path, "not a regular file", dataset)
        with gzip.open(path) if gzipped else open(path, "rb") as file:
            try:
                shape = _read_idx_header(file, size * _MAX_EXPANSION if gzipped else size)
            except ValueError as error:
                raise DataFileError(path, error, dataset) from None
            claim, data = math.prod(shape), bytearray()
            # The last read asks for one byte too many: it finds trailing bytes, or the end of the
            # stream, where gzip compares the checksum.
            while len(data) <= claim and (chunk := file.read(min(2**20, claim + 1 - len(data)))):
                data += chunk
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataFileError(path, reason, dataset) from error
    if len(data) != claim:
        amount = f"only {len(data):,}" if len(data) < claim else "more"
        problem = f"its header claims {claim:,} bytes of data, but it holds {amount}"
        raise DataFileError(path, problem, dataset)
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_idx_header(file, most):
    """Read the shape from the header of a file that holds `most` bytes at most.

    Raise ValueError if it is not plausible.
    """
    magic = file.read(4)
    if magic not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
        raise ValueError(f"starts with {magic.hex(' ')}, expected 00 00 08 and 01 or 03")
    counts = file.read(4 * magic[3])
    if len(counts) < 4 * magic[3]:
        raise ValueError("ends within its header")
    shape = struct.unpack(f">{magic[3]}i", counts)
    if min(shape) < 1:
        raise ValueError(f"its header counts {shape}, expected positive numbers")
    claim, bound = math.prod(shape), min(most, _MAX_IDX_BYTES)
    if claim > bound:
        raise ValueError(f"its header claims {claim:,} bytes, at most {bound:,} are possible")
    return shape


def _idx_path(folder, name):
    """Return the path of an IDX file: gzipped, as it is fetched, or else unpacked."""
    packed = folder / f"{name}.gz"
    # Some archives have a dot where the original has a hyphen.
    unpacked = [folder / name, folder / name.replace("-idx", ".idx")]
    return next((path for path in (packed, *unpacked) if path.exists()), packed)


def read_idx_pair(folder, split, dataset):
    """Read images (N, H, W, 1) uint8 and labels (N,) int32 of one split; they must match."""
    classes = len(config.CLASS_NAMES[dataset])
    images = read_idx(_idx_path(folder, f"{split}-images-idx3-ubyte"), dataset)
    labels = read_idx(_idx_path(folder, f"{split}-labels-idx1-ubyte"), dataset)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max() >= classes:
        problem = (
            f"{split} has {images.shape} images, {labels.shape} labels up to {labels.max()}, "
            f"expected (N, H, W) and (N,) up to {classes - 1}"
        )
        raise DataFileError(folder, problem, dataset)
    return images[..., None], labels.astype(np.int32)


def read_idx_files(name, folder):
    """Read a Dataset from its four IDX files."""
    x_train, y_train = read_idx_pair(folder, "train", name)
    x_test, y_test = read_idx_pair(folder, "t10k", name)
    if x_train.shape[1:] != x_test.shape[1:]:
        sizes = f"{x_train.shape[1:]} in training, {x_test.shape[1:]} in test"
        raise DataFileError(folder, f"images are {sizes}, expected one size", name)
    names = config.CLASS_NAMES[name]
    return Dataset(name, x_train, y_train, x_test, y_test, names, shuffled=True)
