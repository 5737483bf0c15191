import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
import utils
from errors import UserError

DATA = Path(__file__).parent.parent / "data"


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
    order = utils.random_stream(0, 0, "folder train").permutation(20)
    assert labels.tolist() == [int(position >= 10) for position in order]
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
    problem(lambda root: (root / "test/cow").mkdir(), "a class without .*train/cow")
    problem(lambda root: (root / "train/cat/1.png").write_bytes(b"?"), "cannot be read as an image")
    problem(
        lambda root: Image.new("L", (9, 9)).save(root / "test/dog/1.png"),
        r"test/dog/1.png has 9×9 pixels, expected 4×6 like .*train/cat/0.png",
    )
    problem(lambda root: [path.unlink() for path in root.glob("test/*/*.png")], "no images")
