import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import pytest

import xla_cache

ROOT = Path(__file__).resolve().parent.parent
DAY = 24 * 3600  # seconds
# Compiles one function. A copy of TensorFlow's cache file that is loaded keeps its time; what is
# compiled is written again.
PROGRAM = """
import os, pathlib, sys
import runtime, xla_cache
copies = xla_cache.RAM_DISK = pathlib.Path(sys.argv[1])
tf = runtime.start_tensorflow(keep_compiled=True)
def files():
    return list(copies.glob("capsnet-xla-*/*.pb"))
for file in files():
    os.utime(file, (1, 1))
value = tf.function(lambda x: tf.reduce_sum(x * x), jit_compile=True)(tf.range(4.0))
loaded = [file.stat().st_mtime == 1 for file in files()]
print(value.numpy(), loaded, os.environ.get("TF_XLA_FLAGS"))
"""


def run_program(cache, **environment):
    """Output of PROGRAM; nothing may be on its stderr, and its copies must be gone."""
    copies = cache.parent / "memory"
    copies.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, copies],
        cwd=ROOT,
        env=inherited | {"CAPSNET_CACHE": str(cache)} | environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stderr == "" and not any(copies.iterdir())
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
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    assert run_program(cache) == "14.0 [True] None"
    assert files_in(cache) == [file]

    file.write_bytes(content[:-100])
    assert run_program(cache) == "14.0 [False] None"
    (file,) = files_in(cache)
    assert file.name.split(".")[0] == checksum(file.read_bytes())


@pytest.mark.parametrize(
    "environment",
    [
        {"CAPSNET_CACHE": ""},
        {"TF_XLA_FLAGS": "--tf_xla_cpu_global_jit=false"},
        {"TF_CPP_MIN_LOG_LEVEL": "2"},  # the messages of loaded programs would be seen
    ],
)
def test_the_user_may_do_without(tmp_path, environment):
    code = "import xla_cache, os\nwith xla_cache.switched_on(): print(os.environ)"
    before = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    before |= {"XDG_CACHE_HOME": str(tmp_path)} | environment
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=before, text=True)
    assert "persistent_cache" not in printed and "'TF_CPP_MIN_LOG_LEVEL': '3'" not in printed
    assert not any(tmp_path.iterdir())


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The disk in memory: a folder."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(xla_cache, "RAM_DISK", folder)
    return folder


@pytest.fixture
def other_process(monkeypatch, memory):
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


def test_tensorflow_gets_a_copy_in_memory_and_writes_no_messages(
    tmp_path, monkeypatch, other_process, memory
):
    cache = tmp_path / "it's a cache"
    monkeypatch.setenv("CAPSNET_CACHE", str(cache))
    flags, quiet = flags_inside()
    (copy,) = memory.iterdir()
    assert f"directory='{copy}'" in flags and quiet == "3" and not cache.exists()
    assert other_process == [(xla_cache._close, cache / "key", copy)]
    xla_cache._keep(cache / "key", copy)
    assert (cache / "key").stat().st_mode & 0o077 == 0


def a_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("an NVIDIA driver")
    monkeypatch.setattr(xla_cache, "NVIDIA_DRIVER", driver)


def no_space(monkeypatch, tmp_path):
    free = SimpleNamespace(free=xla_cache.FREE_BYTES - 1)
    monkeypatch.setattr(xla_cache.shutil, "disk_usage", lambda path: free)


def no_disk_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(xla_cache, "RAM_DISK", tmp_path / "missing")


def no_cpuinfo(monkeypatch, tmp_path):
    def fail():
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(xla_cache, "machine_key", fail)


def no_home(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(xla_cache, "cache_folder", fail)


@pytest.mark.parametrize("fault", [a_gpu, no_space, no_disk_in_memory, no_cpuinfo, no_home])
def test_where_it_cannot_work_nothing_happens(tmp_path, monkeypatch, other_process, memory, fault):
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    fault(monkeypatch, tmp_path)
    assert flags_inside() == (None, None) and not other_process
    assert not any(memory.iterdir()) and not (tmp_path / "cache").exists()


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


def test_code_for_other_cores_threads_or_options_has_its_own_folder(monkeypatch):
    keys = {xla_cache.machine_key()}
    assert keys == {xla_cache.machine_key()}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")
    keys.add(xla_cache.machine_key())
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "77")
    keys.add(xla_cache.machine_key())
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert xla_cache.machine_key() in keys
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(77)))
    keys.add(xla_cache.machine_key())
    monkeypatch.setattr(xla_cache, "PROCESSOR", r"^bogomips\s*:.*$")
    keys.add(xla_cache.machine_key())
    assert len(keys) == 5


def test_a_processor_that_is_not_described_has_no_key(monkeypatch):
    monkeypatch.setattr(xla_cache, "PROCESSOR", "no such line")
    with pytest.raises(OSError, match="does not describe the processor"):
        xla_cache.machine_key()


def keep(folder, content, name, days_old):
    """Put a file into a folder of the cache, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{checksum(content)}.{name}"
    path.write_bytes(content)
    os.utime(path, (time.time() - days_old * DAY,) * 2)
    return path


def test_a_run_adds_what_is_new_and_the_oldest_are_removed(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(xla_cache, "MOST_FILES", 2)
    folder, copy = tmp_path / "cache" / "key", memory / "copy"
    copy.mkdir()
    keep(folder, b"1", "one.pb", days_old=3)
    two = keep(folder, b"2", "two.pb", days_old=2)
    recent = keep(tmp_path / "cache" / "other", b"1", "one.pb", 89)
    keep(tmp_path / "cache" / "other", b"2", "two.pb", 91)
    mine = tmp_path / "cache" / "other" / "my.pb"
    mine.touch()
    os.utime(mine, (0, 0))
    (copy / "two.pb").write_bytes(b"2, compiled again")  # as XLA does, to other bytes
    (copy / "three.pb").write_bytes(b"3")
    (copy / "three.pbhost.tmp").write_bytes(b"3, half")
    handler = signal.getsignal(signal.SIGINT)
    try:
        xla_cache._close(folder, copy)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    new = folder / f"{checksum(b'3')}.three.pb"
    assert files_in(tmp_path / "cache") == sorted([two, new, recent, mine])
    assert not copy.exists()


def test_a_folder_that_cannot_be_written_keeps_nothing_and_the_copy_goes(tmp_path, memory):
    (tmp_path / "cache").write_text("a file")
    copy = memory / "copy"
    copy.mkdir()
    (copy / "one.pb").write_bytes(b"1")
    with futures.ThreadPoolExecutor() as threads:  # where signals cannot be set
        threads.submit(xla_cache._close, tmp_path / "cache" / "key", copy).result()
    assert not copy.exists() and (tmp_path / "cache").read_text() == "a file"


def test_only_whole_files_are_copied(tmp_path, memory):
    folder = tmp_path / "key"
    whole = keep(folder, b"code", "one.pb", days_old=1)
    keep(folder, b"code", "two.pb", days_old=1).write_bytes(b"cod")
    unreadable = folder / f"{checksum(b'code')}.three.pb"
    unreadable.mkdir()
    (folder / ".123.pb").write_bytes(b"being written")
    copy = xla_cache._open(folder)
    assert [(path.name, path.read_bytes()) for path in copy.iterdir()] == [("one.pb", b"code")]
    assert {*folder.iterdir()} == {whole, unreadable, folder / ".123.pb"}


def test_copies_of_killed_runs_are_removed_and_those_in_use_are_not(tmp_path, memory):
    for name in ("killed", "starting", "in use"):
        (memory / f"capsnet-xla-{name}").mkdir()
    for name in ("killed", "in use"):
        os.utime(memory / f"capsnet-xla-{name}", (time.time() - xla_cache.HOUR - 9,) * 2)
    xla_cache._lock(memory / "capsnet-xla-in use")
    copy = xla_cache._open(tmp_path / "key")
    left = {memory / "capsnet-xla-starting", memory / "capsnet-xla-in use", copy}
    assert {*memory.iterdir()} == left
    with pytest.raises(OSError):
        xla_cache._lock(copy)
