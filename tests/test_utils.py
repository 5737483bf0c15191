import csv
import errno
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import utils
from capsnet_core.errors import UserError

DATA = Path(__file__).parent.parent / "data"


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
    full = pytest.raises(UserError, match="full.txt: .*No space left on device; free some")
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


# --- Images ---------------------------------------------------------------------------------------


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
        assert done == "unchanged"
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
    assert done == "unchanged" and fitted.shape == (6, 4, 3)
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


def test_a_sample_is_spread_evenly_from_the_first_to_the_last():
    numbers = np.arange(3001)
    assert utils.evenly(numbers, 4).tolist() == [0, 1000, 2000, 3000]
    assert utils.evenly(numbers[:3], 4).tolist() == [0, 1, 2]
    assert len(utils.evenly(numbers)) == 1000


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


def test_a_single_array_is_no_npz_file_whatever_the_version_of_python(tmp_path):
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(TypeError, match="a single array"):
        utils.open_npz(tmp_path / "single.npz")
    np.savez(tmp_path / "several.npz", x=np.arange(3))
    with utils.open_npz(tmp_path / "several.npz") as file:
        assert file["x"].tolist() == [0, 1, 2]
