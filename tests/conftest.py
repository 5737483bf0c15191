"""Fixtures that several tests of `training/` share, and a compilation cache for the tests alone."""

import os
import shutil

import pytest
from engine import state, trainer_in


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
