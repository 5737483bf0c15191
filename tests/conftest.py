"""Fixtures that several tests share, their compilation cache, and the order of their files."""

import os
import shutil

import pytest
from engine import state, trainer_in

# The files that take longest are run first, so that both workers end at about the same time.
LONG_FILES = (
    "test_distribution.py",
    "test_commands_train.py",
    "test_experiments.py",
    "test_benchmarks.py",
    "test_commands_export.py",
    "test_runtime.py",
    "test_draw_docs.py",
    "test_xla_cache.py",
)


def pytest_collection_modifyitems(items):
    """Move the tests of LONG_FILES to the front; the order is otherwise that of the names."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The folder in which the commands that tests run keep what XLA compiles."""
    os.environ["CAPSNET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder with a finished run of 2 epochs (12 steps), and its final state.

    Its checkpoints are of the steps 10 and 12.
    """
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_in(folder)
    trainer.fit(2, save_steps=5)
    return folder, state(trainer)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished_run[0], tmp_path / "copy")
    return tmp_path / "copy"
