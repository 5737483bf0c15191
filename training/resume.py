"""Decide where a training run starts: at step 0, or at a checkpoint that all workers restore."""

import json
import zlib

from capsnet_core.errors import NetworkMismatch, RunMismatch, UserError
from training.checkpoints import DAMAGE, saved_steps
from training.distribution import all_equal, barrier, is_chief, sum_over_workers
from training.folders import archive_run


def check_agreement(strategy, settings):
    """Raise UserError if workers were started with different settings, which JSON can hold."""
    if not all_equal(strategy, zlib.crc32(json.dumps(settings).encode())):
        raise UserError(
            "the workers were started with different settings or different data, expected the "
            "same everywhere; nothing was changed"
        )


def resume(checkpoints, folders, metadata, strategy, restart, report):
    """Restore the newest intact checkpoint of a run; the chief decides which that is.

    A finished run of other settings is archived, and with `restart` any earlier one. What a resumed
    run must share with its beginning is in the metadata, under "shape" and "training".

    Returns:
        RunState, or None if training starts at step 0. Raise as `Trainer.fit`.
    """
    chief, state = is_chief(strategy), None
    if chief and restart:
        if saved_steps(checkpoints.folder):
            _archive(folders, report)
    elif chief:
        state = _resume_or_archive(checkpoints, folders, metadata, report)
    step = sum_over_workers(strategy, state.step if state else 0)  # the chief's: others add 0
    if step and not chief:
        state = _restore_step(checkpoints, step)
    barrier(strategy)  # only then may the chief change what is in the folders
    return state


def _resume_or_archive(checkpoints, folders, metadata, report):
    """Restore the newest intact checkpoint, or archive a finished run of other settings."""
    settings = metadata["shape"] | metadata["training"]
    saved, different, state = checkpoints.restore_newest(settings, report)
    if different:
        if saved["step"] < saved["last_step"]:
            raise RunMismatch(checkpoints.folder, saved["step"], saved["last_step"], different)
        _archive(folders, report)
    return state


def _archive(folders, report):
    ending = archive_run(folders)
    report(f"Moved the earlier run aside: {folders.checkpoint}{ending}, {folders.logs}{ending}")


def _restore_step(checkpoints, step):
    """Restore the checkpoint that the chief resumes from."""
    try:
        return checkpoints.restore(step)
    except (*DAMAGE, NetworkMismatch):
        raise UserError(
            f"{checkpoints.folder} does not hold the checkpoint of step {step}, from which the "
            "chief resumes; all workers need the same folder, on a disk that they share"
        ) from None
