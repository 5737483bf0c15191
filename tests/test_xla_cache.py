import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import xla_cache

ROOT = Path(__file__).resolve().parent.parent
# Compiles one function. A copy of TensorFlow's cache file that is loaded keeps its time; what is
# compiled is written again.
PROGRAM = """
import os
import runtime
tf = runtime.start_tensorflow(keep_compiled=True)
import xla_cache
folder = xla_cache.cache_folder() / xla_cache.machine_key()
def files():
    return list(folder.glob("run-*/*.pb"))
for file in files():
    os.utime(file, (1, 1))
value = tf.function(lambda x: tf.reduce_sum(x * x), jit_compile=True)(tf.range(4.0))
loaded = [file.stat().st_mtime == 1 for file in files()]
print(value.numpy(), loaded, os.environ.get("TF_XLA_FLAGS"))
"""


def run_program(cache, **environment):
    """Output of PROGRAM; nothing may be on its stderr."""
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=inherited | {"CAPSNET_CACHE": str(cache)} | environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def files_in(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def checksum(content):
    return hashlib.sha256(content).hexdigest()


def test_a_second_run_loads_what_the_first_compiled_and_compiles_what_was_damaged(tmp_path):
    cache = tmp_path / "a cache"
    assert run_program(cache) == "14.0 [False] None"
    (file,) = files_in(cache)
    content = file.read_bytes()
    assert file.name.split(".")[0] == checksum(content) and file.name.endswith(".pb")
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # the copy is gone

    assert run_program(cache) == "14.0 [True] None"
    assert files_in(cache) == [file]

    file.write_bytes(content[:-100])
    assert run_program(cache) == "14.0 [False] None"
    (file,) = files_in(cache)
    assert file.name.split(".")[0] == checksum(file.read_bytes())


@pytest.mark.parametrize(
    "environment", [{"CAPSNET_CACHE": ""}, {"TF_XLA_FLAGS": "--tf_xla_cpu_global_jit=false"}]
)
def test_the_user_may_do_without(tmp_path, environment):
    code = "import xla_cache, os\nwith xla_cache.switched_on(): print(os.environ)"
    before = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    before |= {"XDG_CACHE_HOME": str(tmp_path)} | environment
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=before, text=True)
    assert ("persistent_cache" in printed, "TF_CPP_MIN" in printed) == (False, False)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def other_process(monkeypatch):
    """The state of a process that has not imported TensorFlow."""
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    monkeypatch.setattr(xla_cache, "machine_key", lambda: "key")
    closes = []
    monkeypatch.setattr(xla_cache.atexit, "register", lambda *call: closes.append(call))
    return closes


def flags_inside():
    with xla_cache.switched_on():
        inside = os.environ.get("TF_XLA_FLAGS"), os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    assert "TF_XLA_FLAGS" not in os.environ
    return inside


def test_tensorflow_gets_a_copy_and_writes_no_messages(tmp_path, monkeypatch, other_process):
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path))
    flags, quiet = flags_inside()
    (copy,) = (tmp_path / "key").iterdir()
    assert f"directory='{copy}'" in flags and quiet == "3"
    assert other_process == [(xla_cache._close, tmp_path / "key", copy)]
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0


def a_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("an NVIDIA driver")
    monkeypatch.setattr(xla_cache, "NVIDIA_DRIVER", driver)


def no_space(monkeypatch, tmp_path):
    def fail(size):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "urandom", fail)


def no_folder(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")


def no_cpuinfo(monkeypatch, tmp_path):
    def fail():
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(xla_cache, "machine_key", fail)


def no_home(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(xla_cache, "cache_folder", fail)


def an_apostrophe(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "it's"))


def a_damaged_disk(monkeypatch, tmp_path):
    (tmp_path / "cache" / "key").mkdir(parents=True)
    (tmp_path / "cache" / "key" / "abc.x.pb").mkdir()  # not readable as a file


@pytest.mark.parametrize(
    "fault",
    [a_gpu, no_space, no_folder, no_cpuinfo, no_home, an_apostrophe, a_damaged_disk],
)
def test_where_it_cannot_work_nothing_happens(tmp_path, monkeypatch, other_process, fault):
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    fault(monkeypatch, tmp_path)
    assert flags_inside() == (None, None) and not other_process
    assert not list(tmp_path.rglob("run-*"))


def test_the_folder_is_the_one_named_or_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CAPSNET_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert xla_cache.cache_folder() == tmp_path / ".cache" / "capsnet"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert xla_cache.cache_folder() == Path("/elsewhere/capsnet")
    monkeypatch.setenv("CAPSNET_CACHE", "~/kept")
    assert xla_cache.cache_folder() == tmp_path / "kept"
    monkeypatch.setenv("CAPSNET_CACHE", "here")
    assert xla_cache.cache_folder() == Path.cwd() / "here"


def test_code_for_another_number_of_cores_or_other_options_of_xla_has_its_own_folder(monkeypatch):
    keys = {xla_cache.machine_key()}
    assert keys == {xla_cache.machine_key()}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")
    keys.add(xla_cache.machine_key())
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(77)))
    keys.add(xla_cache.machine_key())
    monkeypatch.setattr(xla_cache, "PROCESSOR", r"^bogomips\s*:.*$")
    keys.add(xla_cache.machine_key())
    assert len(keys) == 4


def test_a_run_adds_its_files_and_the_oldest_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(xla_cache, "MOST_FILES", 2)
    folder, copy = tmp_path / "key", tmp_path / "key" / "run-1"
    copy.mkdir(parents=True)
    names = [f"{checksum(text)}.{name}" for text, name in [(b"1", "one.pb"), (b"2", "two.pb")]]
    for seconds, (name, text) in enumerate(zip(names, [b"1", b"2"], strict=True)):
        (folder / name).write_bytes(text)
        os.utime(folder / name, (seconds, seconds))
    (copy / "two.pb").write_bytes(b"2")  # as it was
    (copy / "three.pb").write_bytes(b"3")
    (copy / "three.pbhost.tmp").write_bytes(b"3, half")
    xla_cache._close(folder, copy)
    new = f"{checksum(b'3')}.three.pb"
    assert sorted(path.name for path in folder.iterdir()) == sorted([names[1], new])


def test_only_whole_files_are_copied_and_copies_of_killed_runs_are_removed(tmp_path):
    whole = tmp_path / f"{checksum(b'code')}.one.pb"
    whole.write_bytes(b"code")
    (tmp_path / f"{checksum(b'code')}.two.pb").write_bytes(b"cod")
    (tmp_path / ".123.pb").write_bytes(b"being written")
    for name, age in [("run-new", 100), ("run-old", xla_cache.STALE_SECONDS + 100)]:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    copy = xla_cache._open(tmp_path)
    assert [(path.name, path.read_bytes()) for path in copy.iterdir()] == [("one.pb", b"code")]
    assert {path.name for path in tmp_path.iterdir()} == {
        whole.name,
        ".123.pb",
        "run-new",
        copy.name,
    }
