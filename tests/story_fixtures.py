"""Fixtures of the tests of the command line: a plugin that they name in `pytest_plugins`."""

import json

import pytest
from story import QUICK, ROOT, SMALL, Story, first_images, load_all

from figures import confusion, examples, files, grids, plots, tweaks
from inputs import datasets


@pytest.fixture(scope="module")
def few():
    """Make commands load the first 400 training and 200 test images only, and in no time."""
    part = first_images(load_all("mnist", ROOT / "data"), 400, 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: part)
        yield part


@pytest.fixture
def all_images(monkeypatch):
    """Make commands load all images again."""
    monkeypatch.setattr(datasets, "load_dataset", load_all)


@pytest.fixture
def drawn(monkeypatch):
    """What the functions that draw pictures were given, by the file that was written."""
    given, made = {}, []

    def spy_on_drawing(draw):
        def spy(*args):
            made.append((draw(*args), args))
            return made[-1][0]

        return spy

    def spy_on_writing(write):
        def spy(path, picture):
            (given[str(path)],) = (args for pixels, args in made if pixels is picture)
            write(path, picture)

        return spy

    for module in (confusion, examples, grids, plots, tweaks):
        for name in vars(module):
            if name.startswith("draw_"):
                monkeypatch.setattr(module, name, spy_on_drawing(getattr(module, name)))
    for name in ("write_png", "write_gif"):
        monkeypatch.setattr(files, name, spy_on_writing(getattr(files, name)))
    return given


@pytest.fixture(scope="module")
def story(few, tmp_path_factory):
    """The commands of the README, one after another; with few images and a small network."""
    story = Story(tmp_path_factory.mktemp("story"))
    story.type("deformed", "--train", "--data_deformation", *SMALL)
    story.type("same again", "--train", "--data_deformation", *SMALL)
    story.type("longer", "--train", "--data_deformation", *SMALL, "--epoch=2")
    story.type("examined", "--test", "--tweak_test", "--reconstruction_test", *QUICK)
    story.json = json.loads((story.folder / "logs/mnist/test.json").read_text())
    story.type("validated", "--train", "--validation_check=True", *SMALL)
    story.type("best tested", "--train=False", "--validation_check=True", "--test", *QUICK)
    return story


@pytest.fixture(scope="module")
def pairs(few, tmp_path_factory):
    """The commands for overlapping digits."""
    story = Story(tmp_path_factory.mktemp("pairs"))
    story.type("trained", "--train", "--multi_MNIST", "--data_deformation", *SMALL)
    examine = ["--test", "--tweak_test", "--reconstruction_test"]
    story.type("examined", "--multi_MNIST", *examine, *QUICK)
    return story
