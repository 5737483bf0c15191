"""Fixtures that several tests of `training/` share."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from engine import state, trainer_in


class FinishedRun(NamedTuple):
    """A run of 2 epochs (12 steps), with checkpoints of the steps 10 and 12."""

    folder: Path
    state: list  # see `engine.state`
    progress: list  # after each step


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A FinishedRun."""
    folder, progress = tmp_path_factory.mktemp("finished"), []
    trainer = trainer_in(folder, on_train_batch_end=progress.append)
    trainer.fit(2, save_steps=5)
    return FinishedRun(folder, state(trainer), progress)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished_run.folder, tmp_path / "copy")
    return tmp_path / "copy"
