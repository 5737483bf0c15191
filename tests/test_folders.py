"""Locks, claims and archives of the folders of a run."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import Crash, folders_in

from capsnet_core.errors import FolderInUse, FolderTaken
from training.folders import archive_run, claim, run_lock

ROOT = Path(__file__).parent.parent


def silent(text):
    raise AssertionError(text)


def test_a_locked_folder_is_refused_until_the_lock_is_released_also_by_an_error(tmp_path):
    folder, other = tmp_path / "deep" / "run", tmp_path / "deep" / "other"
    with pytest.raises(Crash), run_lock([folder], silent):
        with pytest.raises(FolderInUse) as caught, run_lock([other, folder], silent):
            raise AssertionError("locked twice")
        with run_lock([other], silent):  # the refused lock has left it free
            pass
        raise Crash
    assert caught.value.folder == folder and not folder.exists()
    with run_lock([folder, other], silent):
        pass


HOLDER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from training.folders import run_lock
with run_lock([pathlib.Path(sys.argv[2])], print):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_another_process_holds_while_it_lives_and_ends_when_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, ROOT, folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(FolderInUse), run_lock([folder], silent):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with run_lock([folder], silent):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_the_run_goes_ahead_with_a_warning_and_leaves_none(
    tmp_path, monkeypatch, number
):
    """What Lustre and NFS answer; only a lock that another process has keeps a run out."""

    def flock(file, operation):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    said, folders = [], [tmp_path / "first", tmp_path / "second"]
    with run_lock(folders, said.append), run_lock(folders, said.append):
        pass
    assert len(said) == 2 and said[0] == said[1]
    assert said[0] == (
        f"The file system has no locks for {folders[0]}, {folders[1]}: make sure that no other "
        "training run writes there."
    )
    assert {path.name for path in tmp_path.iterdir()} == {".first.lock", ".second.lock"}
    monkeypatch.undo()
    with run_lock(folders, silent):
        pass


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_taken_keeps_the_run_out(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, "taken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FolderInUse), run_lock([tmp_path / "run"], silent):
        pass


def test_a_claimed_folder_is_refused_to_a_run_whose_checkpoints_are_elsewhere(tmp_path):
    folder, owner, other = (tmp_path / name for name in ("logs/mnist", "first/mnist", "other"))
    owner.mkdir(parents=True)
    claim(folder, owner)
    assert (folder / "run").read_text() == "../../first/mnist\n"
    claim(folder, owner)
    with pytest.raises(FolderTaken) as caught:
        claim(folder, other)
    assert caught.value.folder == folder and caught.value.owner.resolve() == owner
    assert (folder / "run").read_text() == "../../first/mnist\n"
    owner.rename(tmp_path / "gone")  # a run without checkpoints owns nothing
    claim(folder, other)
    assert (folder / "run").read_text() == "../../other\n"


def test_a_claim_may_be_of_a_folder_with_any_name(tmp_path):
    """The encoding of text files is not UTF-8 in every locale."""
    owner = tmp_path / "猫"
    owner.mkdir()
    claim(tmp_path / "logs", owner)
    assert (tmp_path / "logs" / "run").read_bytes() == "../猫\n".encode()
    with pytest.raises(FolderTaken):
        claim(tmp_path / "logs", tmp_path / "other")
    claim(tmp_path / "odd", tmp_path / os.fsdecode(b"\xff"))
    assert (tmp_path / "odd" / "run").read_bytes() == b"../\xff\n"


def test_a_claim_that_a_kill_left_empty_is_no_claim(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run").write_text("")
    claim(tmp_path / "logs", tmp_path / "checkpoint")
    assert (tmp_path / "logs" / "run").read_text() == "../checkpoint\n"


def filled(folder, *names):
    folders = folders_in(folder)
    for path in (*folders, *(folder / name for name in names)):
        path.mkdir(parents=True)
        (path / "file").write_text(path.name)
    return folders


def test_a_run_is_archived_under_the_first_number_that_no_folder_of_it_has(tmp_path):
    folders = filled(tmp_path, "logs.1", "best.2")
    assert archive_run(folders) == ".3"
    for folder in folders:
        assert not folder.exists()
        assert Path(f"{folder}.3", "file").read_text() == folder.name
    assert (tmp_path / "logs.1" / "file").read_text() == "logs.1"
    folders.logs.mkdir()  # a run without validation
    assert archive_run(folders) == ".4"
    assert (tmp_path / "logs.4").is_dir() and not (tmp_path / "best.4").exists()


def test_a_kill_while_a_run_is_archived_leaves_its_checkpoints_for_the_next_try(
    tmp_path, monkeypatch
):
    folders, rename, renamed = filled(tmp_path), Path.rename, []

    def killed(self, target):
        if self.name == "checkpoint":
            raise Crash
        renamed.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Crash):
        archive_run(folders)
    assert renamed == ["logs", "best"] and (folders.checkpoint / "file").exists()
