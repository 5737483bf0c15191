import os
import shutil

import numpy as np
import pytest
from PIL import Image

from capsnet_core.errors import ImageSizesDiffer, UserError
from inputs import datasets
from inputs.image_reader import read_image
from inputs.readers import image_folders


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


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
    data = datasets.load_dataset(str(folders(tmp_path / "pets", colour)), "nowhere")
    assert data.name == "pets" and data.class_names == ("cat", "dog")
    assert data.x_train.shape == (6, 6, 4, 3 if colour else 1) and data.x_test.shape[0] == 4
    train = sorted(zip(data.x_train[:, 0, 0, -1].tolist(), data.y_train.tolist(), strict=True))
    assert train == [(0, 0), (10, 0), (20, 0), (100, 1), (110, 1), (120, 1)]
    test = sorted(zip(data.x_test[:, 5, 3, 0].tolist(), data.y_test.tolist(), strict=True))
    red = 150 if colour else 100
    assert test == [(1, 0), (11, 0), (red + 1, 1), (red + 11, 1)]


def test_the_classes_of_a_folder_are_mixed_the_same_way_each_time(tmp_path):
    folder = str(folders(tmp_path / "pets", False, train=10))
    labels = datasets.load_dataset(folder, "").y_train
    assert 2 <= labels[:10].sum() <= 8 and labels.sum() == 10
    np.testing.assert_array_equal(datasets.load_dataset(folder, "").y_train, labels)


def test_a_folder_that_is_no_data_set_is_refused_with_what_is_wrong(tmp_path):
    def problem(change, named):
        shutil.rmtree(tmp_path / "pets", ignore_errors=True)
        change(folders(tmp_path / "pets", True))
        with pytest.raises(UserError, match=named) as error:
            datasets.load_dataset(str(tmp_path / "pets"), "")
        one_line(error)

    problem(lambda root: shutil.rmtree(root / "train/dog"), "two classes or more")
    problem(lambda root: shutil.rmtree(root / "test"), "test/CLASS")
    problem(
        lambda root: (root / "test/cow").mkdir(), "cow: there are no training images of this class"
    )
    problem(lambda root: (root / "train/cat/1.png").write_bytes(b"?"), "cannot be read as an image")
    problem(
        lambda root: Image.new("L", (9, 9)).save(root / "test/dog/1.png"),
        r"test/dog/1.png has 9×9 pixels, expected 4×6 like .*train/cat/0.png",
    )
    problem(lambda root: [path.unlink() for path in root.glob("test/*/*.png")], "no images")


# --- Which files are read -------------------------------------------------------------------------

GREY = np.arange(24, dtype=np.uint8).reshape(6, 4) * 5


def write(path, image=GREY, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def small_set(root, splits=("train", "test"), classes=("cat", "dog"), count=2):
    """A folder of images, each of its own grey."""
    value = 0
    for split in splits:
        for name in classes:
            for number in range(count):
                value += 1
                image = np.full((6, 4), value, np.uint8)
                image[4, 2] = 255  # not so dark that it is doubted
                write(root / split / name / f"{number}.png", image)
    return root


def load(folder, **options):
    return datasets.load_dataset(str(folder), "nowhere", **options)


@pytest.mark.parametrize(
    "suffix", ["png", "PNG", "jpg", "jpeg", "jfif", "ppm", "pgm", "pbm", "bmp", "gif", "tif", "tga"]
)
def test_every_form_that_pillow_opens_is_read(tmp_path, suffix):
    small_set(tmp_path / "pets")
    image = Image.new("1" if suffix == "pbm" else "L", (4, 6), 255)
    forms = {"jfif": "JPEG", "PNG": "PNG", "pgm": "PPM", "pbm": "PPM"}
    image.save(tmp_path / f"pets/train/cat/new.{suffix}", forms.get(suffix))
    data = load(tmp_path / "pets")
    assert len(data.y_train) == 5 and data.notes == ()
    assert sorted(data.x_train[:, 3, 3, 0].tolist()) == [1, 2, 3, 4, 255]


def test_forms_that_pillow_hands_to_other_programs_are_not_read():
    suffixes = image_folders.image_suffixes()
    assert not suffixes & {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf", ".grib"}
    assert {".png", ".webp", ".jfif", ".ppm"} <= suffixes


def test_what_is_left_out_is_counted_by_its_kind(tmp_path):
    root = small_set(tmp_path / "pets")
    for name in ("train/cat/._0.png", "train/dog/.DS_Store", "test/cat/a.heic", "train/cat/b.heic"):
        (root / name).write_bytes(b"")
    (root / "train/cat/notes").write_bytes(b"")
    (root / "train/dog/more").mkdir()
    (root / "train/labels.csv").write_bytes(b"")
    (root / "extra").mkdir()
    os.mkfifo(root / "train/dog/pipe.png")  # to read it would block
    for name in ("train/__MACOSX", "test/__MACOSX", "train/.git", "__MACOSX/pets"):
        (root / name).mkdir(parents=True)
    data = load(root)
    assert data.class_names == ("cat", "dog") and len(data.y_train) == len(data.y_test) == 4
    (note,) = data.notes
    assert note == (
        "left out: 2 .heic, 1 beside the splits, 1 folders in a class, with their files, 2 hidden "
        "(a dot first), 1 in no class, 1 not regular files, 1 without a suffix"
    )


def test_a_class_without_images_is_refused(tmp_path):
    for split in "train", "test":
        root = small_set(tmp_path / split)
        for path in (root / split / "cat").iterdir():
            path.rename(path.with_suffix(".heic"))
        with pytest.raises(UserError, match=f"{split}: no images in cat, expected some") as error:
            load(root)
        one_line(error)


def test_all_damaged_files_are_named_at_once_the_first_ten_and_how_many(tmp_path):
    root = small_set(tmp_path / "pets", count=7)
    damaged = [root / f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(6)]
    for number in 2, 10, 12:
        for path in damaged[:number]:
            path.write_bytes(b"?")
        with pytest.raises(UserError, match=f"{number} files cannot be read") as error:
            load(root)
        text = one_line(error)
        assert all(str(path) in text for path in damaged[: min(10, number)])
        assert ("and 2 more" in text) is (number == 12)


def test_classes_come_in_natural_order(tmp_path):
    names = ["10", "0", "2", "11", "1", "b", "a10", "a9", "z"]
    data = load(small_set(tmp_path / "numbers", classes=names))
    assert data.class_names == ("0", "1", "2", "10", "11", "a9", "a10", "b", "z")
    greys = {name: 1 + 2 * place for place, name in enumerate(names)}  # of its first image
    for image, label in zip(data.x_train[:, 0, 0, 0], data.y_train, strict=True):
        assert image in (greys[data.class_names[label]], greys[data.class_names[label]] + 1)


# --- Sizes and splits -----------------------------------------------------------------------------


def test_images_of_different_sizes_are_refused_or_made_to_fit(tmp_path):
    root = small_set(tmp_path / "pets")
    photo = np.zeros((30, 60, 3), np.uint8)
    photo[:, :30] = 200, 100, 50
    write(root / "train/cat/photo.png", photo)
    with pytest.raises(ImageSizesDiffer, match="photo.png has 60×30 pixels, expected 4×6 like"):
        load(root)
    data = load(root, image_size=(10, 20))
    assert data.x_train.shape == (5, 10, 20, 3) and data.x_test.shape == (4, 10, 20, 3)
    index = int(np.argmax(data.x_train[:, 5, 2, 0]))
    assert data.x_train[index, 5, 2].tolist() == [200, 100, 50]
    assert data.x_train[index, 5, 17].tolist() == [0, 0, 0]
    assert data.notes == ("images made to fit 10x20 pixels",)


@pytest.mark.parametrize(
    "splits", [("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("train", "test")]
)
@pytest.mark.parametrize("wrapping", ["", "pets", "pets/more"])
def test_splits_may_be_in_capitals_and_wrapped_in_another_folder(tmp_path, splits, wrapping):
    small_set(tmp_path / "pets" / wrapping, splits)
    (tmp_path / "pets/__MACOSX").mkdir()
    data = load(tmp_path / "pets")
    assert data.name == "pets" and data.class_names == ("cat", "dog") and data.notes == ()
    assert sorted(data.x_train[:, 0, 0, 0].tolist()) == [1, 2, 3, 4]
    assert sorted(data.x_test[:, 0, 0, 0].tolist()) == [5, 6, 7, 8]


def test_two_folders_of_the_same_split_are_refused(tmp_path):
    root = small_set(tmp_path / "pets", ("train", "test", "training"))
    with pytest.raises(UserError, match="train and training are the same split"):
        load(root)


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_a_validation_folder_is_a_part_of_its_own(tmp_path, name):
    data = load(small_set(tmp_path / "pets", ("train", "test", name)))
    assert sorted(data.x_train[:, 0, 0, 0].tolist()) == [1, 2, 3, 4]
    assert sorted(data.x_validation[:, 0, 0, 0].tolist()) == [9, 10, 11, 12]
    labels = dict(zip(data.x_validation[:, 0, 0, 0].tolist(), data.y_validation, strict=True))
    assert labels == {9: 0, 10: 0, 11: 1, 12: 1}
    assert load(small_set(tmp_path / "other")).x_validation is None


def test_the_files_of_the_test_images_are_known_in_their_order(tmp_path):
    for splits in ("train", "test"), ("",):
        data = load(small_set(tmp_path / f"pets{len(splits)}", splits, count=12))
        assert len(data.test_files) == len(data.x_test)
        for path, image in zip(data.test_files, data.x_test, strict=True):
            np.testing.assert_array_equal(read_image(path).pixels, image)


def test_splits_without_a_test_folder_are_named(tmp_path):
    root = small_set(tmp_path / "pets", ("train", "val"))
    with pytest.raises(UserError, match="found train and val, expected also test/CLASS") as error:
        load(root)
    one_line(error)


def test_classes_may_have_the_name_of_a_split(tmp_path):
    root = small_set(tmp_path / "votes", ("",), ("valid", "invalid", "test"), 6)
    assert load(root).class_names == ("invalid", "test", "valid")


def test_a_class_that_is_never_tested_is_named(tmp_path):
    root = small_set(tmp_path / "pets")
    shutil.rmtree(root / "test/dog")
    assert load(root).notes == ("no test images of dog",)


def test_classes_whose_names_are_shown_alike_are_refused(tmp_path):
    root = small_set(tmp_path / "odd", ("",), ("a\n", "a\\n"), 6)
    with pytest.raises(UserError, match="differ only in characters that cannot be shown") as error:
        load(root)
    one_line(error)


def parts(data):
    return [sorted(part[:, 0, 0, 0].tolist()) for part in (data.x_train, data.x_test)]


def test_of_a_folder_without_splits_a_sixth_is_held_out_by_the_seed(tmp_path):
    root = small_set(tmp_path / "pets", ("",), count=12)
    data = load(root)
    train, test = parts(data)
    assert sorted(train + test) == list(range(1, 25)) and len(test) == 4
    assert np.bincount(data.y_test).tolist() == [2, 2]  # as many of each class
    for images, labels in (data.x_train, data.y_train), (data.x_test, data.y_test):
        assert (images[:, 0, 0, 0] > 12).astype(int).tolist() == labels.tolist()
    (note,) = data.notes
    assert note == (
        "no train and test folders, so 4 of 24 images, drawn by seed 0, are held out as test images"
    )
    assert data.held_out_seed == 0 and load(root, seed=3).held_out_seed == 3
    assert parts(load(root)) == [train, test]
    assert len({tuple(parts(load(root, seed=seed))[1]) for seed in range(5)}) > 1


@pytest.mark.parametrize("cats, dogs", [(1, 5), (1, 20), (7, 8), (3, 40)])
def test_every_class_keeps_images_to_train(tmp_path, cats, dogs):
    small_set(tmp_path / "pets", ("",), ("cat",), cats)
    small_set(tmp_path / "pets", ("",), ("dog",), dogs)
    data = load(tmp_path / "pets")
    assert len(data.y_test) == (cats + dogs) // 6
    assert set(data.y_train) == {0, 1}


def test_too_few_images_to_hold_out_some_are_refused(tmp_path):
    small_set(tmp_path / "five", ("",), ("cat",), 2)
    small_set(tmp_path / "five", ("",), ("dog",), 3)
    small_set(tmp_path / "singles", ("",), tuple("abcdefg"), 1)
    for name, count in ("five", 5), ("singles", 7):
        with pytest.raises(UserError, match=f"{count} images, too few to hold out a sixth"):
            load(tmp_path / name)


def test_a_folder_without_classes_is_refused(tmp_path):
    write(tmp_path / "flat/a.png")
    write(tmp_path / "single/cat/a.png")
    for name in "flat", "single":
        with pytest.raises(UserError, match="or CLASS for two classes or more") as error:
            load(tmp_path / name)
        assert f"{tmp_path / name}: " in one_line(error)


# --- What the pixels are --------------------------------------------------------------------------


def deep_set(root, white, dtype=np.uint16):
    """A folder of 16-bit images, whose pixels are a share of white: 0, 1/5, ..., 1."""
    shares = np.linspace(0, 1, 6)
    for split in "train", "test":
        for number, name in enumerate(("cat", "dog")):
            image = np.rint(white * np.roll(shares, number)).reshape(2, 3).astype(dtype)
            image[image == white] //= 1 + (split == "test")  # the whole set decides, not a split
            write(root / split / name / "0.png", image)
    return root


@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("options", [{}, {"image_size": (2, 3)}])
def test_white_in_16_bits_is_the_end_of_the_range_of_the_whole_set(tmp_path, white, options):
    data = load(deep_set(tmp_path / "deep", white), **options)
    expected = [0, 51, 102, 153, 204, 255]
    assert data.white == white
    assert np.abs(np.sort(data.x_train.reshape(2, 6).astype(int)) - expected).max() <= 1
    assert data.x_test.max() == 204 and data.x_train.dtype == np.uint8
    said = f"grey of 16 bits from 0 to {white} in 4 of 4 files, scaled to 0 to 255"
    assert (said in data.notes) is (white != 65535)
    assert load(small_set(tmp_path / "pets")).white is None


@pytest.mark.parametrize("white", [300, 1500, 16383])
def test_a_folder_whose_white_is_unclear_is_refused_with_advice(tmp_path, white):
    with pytest.raises(UserError, match=f"grey of 16 bits from 0 to {white} in 4 files") as error:
        load(deep_set(tmp_path / "deep", white))
    assert "multiply all pixels by 65535 / white" in one_line(error)


def test_a_folder_of_nearly_black_images_is_refused(tmp_path):
    """As those of 12 bits in 16 are in colour: Pillow drops the lower 8."""
    for number, brightest in enumerate((1, 15, 16)):
        root = tmp_path / str(number)
        for split, name in np.ndindex(2, 2):
            image = np.zeros((6, 4), np.uint8)
            image[2, 2] = brightest
            write(root / ("train", "test")[split] / "ab"[name] / "0.png", image)
        if brightest == 16:
            assert load(root).x_train.max() == 16
            continue
        with pytest.raises(UserError, match=f"largest value in all images is {brightest}, exp"):
            load(root)


def test_several_frames_in_a_file_are_said(tmp_path):
    root = small_set(tmp_path / "pets")
    frames = [Image.new("L", (4, 6), value) for value in (90, 120)]
    frames[0].save(root / "train/cat/a.gif", save_all=True, append_images=frames[1:])
    data = load(root)
    assert data.notes == ("1 of 9 files have several frames or pages, the first is used",)
    assert 90 in data.x_train and 120 not in data.x_train
