"""Fixtures that several tests of `training/` share."""

import shutil

import pytest
from engine import state, trainer_in


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
