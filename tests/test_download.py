"""download.py against a local server that fails in every way a mirror can."""

import gzip
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from benchmark_lib.faulty_server import FLOOD_BYTES, GOOD, LABELS, WRONG, serving

import download
from download import DownloadError, File

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
GOOD_SHA256 = "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
WRONG_SHA256 = hashlib.sha256(bytes(60008)).hexdigest()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No built-in mirror, no proxy, one file to fetch, and short waits."""
    monkeypatch.setenv("no_proxy", "*")
    mnist = download.DATASETS["mnist"]
    labels = tuple(file for file in mnist.files if file.name == LABELS)
    monkeypatch.setitem(download.DATASETS, "mnist", download.Source((), labels))
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 5)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "mnist" / LABELS


def get(tmp_path, mirror):
    """Fetch and return the lines of the report."""
    lines = []
    folder = download.fetch("mnist", tmp_path, mirror, lines.append)
    assert folder == tmp_path / "mnist"
    return lines


def script(*args, setup="", files=slice(None), **options):
    """Start the command line in a process of its own, with no built-in mirrors."""
    code = (
        "import shutil, signal, sys, download\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "for name, info in download.DATASETS.items():\n"
        f"    download.DATASETS[name] = info._replace(mirrors=(), files=info.files[{files!r}])\n"
        f"download.BACKOFF = 0.01\n{setup}\nsys.exit(download.main(sys.argv[1:]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        **options,
    )


def failure(process, code=1):
    """The one line on stderr of a process that failed with `code`."""
    _, err = process.communicate(timeout=15)
    assert process.returncode == code, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != LABELS]


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What is on disk


def test_the_tracked_mnist_files_verify_without_a_request():
    process = script("mnist", f"--data_dir={DATA}", "--mirror=http://127.0.0.1:9/")
    out, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("mnist: train-images-idx3-ubyte.gz verified (SHA-256 ba891046")


def test_every_set_has_four_files_of_the_right_lengths_and_distinct_hashes():
    headers_and_items = [16 + 60000 * 28 * 28, 8 + 60000, 16 + 10000 * 28 * 28, 8 + 10000]
    assert [file.size for file in download.DATASETS["fashion_mnist"].files] == headers_and_items
    hashes = [f.sha256 for name in ("fashion_mnist", "kmnist") for f in download.DATASETS[name][1]]
    assert len(set(hashes)) == 8 and all(len(bytes.fromhex(h)) == 32 for h in hashes)
    for info in download.DATASETS.values():
        assert all((DATA / "mnist" / file.name).exists() for file in info.files)
    assert all(file.packed for file in download.DATASETS["kmnist"].files)
    assert not any(file.packed for file in download.DATASETS["fashion_mnist"].files)


@pytest.mark.parametrize("level", [0, 1, 9])
def test_any_recompression_of_the_right_bytes_is_right(tmp_path, target, level):
    target.parent.mkdir()
    raw = gzip.decompress(GOOD)
    halves = gzip.compress(raw[:30000], level) + gzip.compress(raw[30000:], level)
    target.write_bytes(halves)
    assert get(tmp_path, None) == [f"mnist: {LABELS} verified (SHA-256 65a50cbbf4e9...)"]
    assert target.read_bytes() == halves


@pytest.mark.parametrize("name", [LABELS[:-3], LABELS[:-3].replace("-idx", ".idx")])
def test_an_unpacked_file_is_verified_and_replaced_only_if_it_is_damaged(
    tmp_path, target, server, name
):
    path = target.parent / name
    path.parent.mkdir()
    path.write_bytes(gzip.decompress(GOOD))
    assert get(tmp_path, None) == [f"mnist: {name} verified (SHA-256 65a50cbbf4e9...)"]
    assert leftovers(tmp_path) == [path]
    path.write_bytes(gzip.decompress(GOOD)[:-1])
    lines = get(tmp_path, server.url + "ok")
    assert lines[0].startswith(f"mnist: {name} damaged") and "verified" in lines[-1]
    assert target.read_bytes() == GOOD  # which is read before the unpacked one


def test_a_packed_file_is_right_only_byte_for_byte(tmp_path):
    file = File("x.gz", len(GOOD), hashlib.sha256(GOOD).hexdigest(), packed=True)
    path = tmp_path / "x.gz"
    path.write_bytes(GOOD)
    assert download.verify(path, file) is None
    path.write_bytes(gzip.compress(gzip.decompress(GOOD), 1))
    with pytest.raises(DownloadError, match="contents: expected SHA-256"):
        download.verify(path, file)


def test_a_right_beginning_with_more_after_it_is_damage(tmp_path):
    path = tmp_path / LABELS
    path.write_bytes(GOOD + gzip.compress(b"more"))
    with pytest.raises(DownloadError, match="not the right contents"):
        download.verify(path, download.DATASETS["mnist"].files[0])


def test_a_sound_gzip_file_of_other_bytes_is_damage(tmp_path):
    raw = bytearray(gzip.decompress(GOOD))
    raw[5000] ^= 1
    path = tmp_path / LABELS
    path.write_bytes(gzip.compress(bytes(raw)))  # its own CRC is right
    with pytest.raises(DownloadError, match=hashlib.sha256(raw).hexdigest()):
        download.verify(path, download.DATASETS["mnist"].files[0])


def test_a_bomb_on_disk_does_not_fill_the_memory(tmp_path):
    path = tmp_path / LABELS
    path.write_bytes(gzip.compress(bytes(20_000_000)) * 50)  # a gigabyte
    tracemalloc.start()
    with pytest.raises(DownloadError, match=GOOD_SHA256) as caught:
        download.verify(path, download.DATASETS["mnist"].files[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert int(re.search(r"(\d+) bytes read", str(caught.value))[1]) < 1_000_000


def test_a_right_file_is_left_alone_and_nothing_is_requested(tmp_path, target, server):
    target.parent.mkdir()
    target.write_bytes(GOOD)
    before = target.stat()
    get(tmp_path, server.url + "wrong")
    after = target.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert server.paths == []


DAMAGES = {
    "flipped": GOOD[:9000] + bytes([GOOD[9000] ^ 4]) + GOOD[9001:],
    "truncated": GOOD[:-2000],
    "without its checksum": GOOD[:-8],
    "empty": b"",
    "another file": WRONG,
    "a page": b"<html>log in</html>",
}


def test_a_fetched_file_is_synced_to_disk_before_it_takes_its_name(
    tmp_path, target, server, monkeypatch
):
    calls = []

    def fsync(descriptor, real=os.fsync):
        real(descriptor)
        status = os.fstat(descriptor)
        calls.append(("fsync", status.st_ino, status.st_size))

    def replace(source, place, real=os.replace):
        status = os.stat(source)
        calls.append(("replace", status.st_ino, status.st_size))
        real(source, place)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(download, "CHUNK", 1000)  # small enough to stay in Python's buffer at first
    get(tmp_path, server.url + "ok")
    whole_file = target.stat().st_ino, len(GOOD)
    assert calls == [("fsync", *whole_file), ("replace", *whole_file)]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_repaired(tmp_path, target, server, damage):
    target.parent.mkdir()
    target.write_bytes(damage)
    lines = get(tmp_path, server.url + "ok")
    assert lines[0].startswith(f"mnist: {LABELS} damaged") and GOOD_SHA256 in lines[0]
    assert lines[-1] == f"mnist: {LABELS} verified (SHA-256 65a50cbbf4e9...)"
    assert target.read_bytes() == GOOD
    assert server.paths == [f"/ok/{LABELS}"] and not leftovers(tmp_path)


def test_a_damaged_file_stays_until_a_good_one_is_there(tmp_path, target, server):
    target.parent.mkdir()
    target.write_bytes(DAMAGES["flipped"])
    with pytest.raises(DownloadError):
        get(tmp_path, server.url + "wrong")
    assert target.read_bytes() == DAMAGES["flipped"]


# What mirrors answer


@pytest.mark.parametrize("answer", ["ok", "chunked", "keep", "stored"])
def test_a_missing_file_is_fetched_however_it_is_sent(tmp_path, target, server, answer):
    lines = get(tmp_path, server.url + answer)
    assert lines[0] == f"mnist: {LABELS} missing"
    assert gzip.decompress(target.read_bytes()) == gzip.decompress(GOOD)
    assert not leftovers(tmp_path)


def test_a_fetched_file_has_the_permissions_of_any_new_file(tmp_path, target, server):
    get(tmp_path, server.url + "ok")
    (tmp_path / "other").touch()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        ("forbidden", 1, "HTTP 403"),
        ("absent", 1, "HTTP 404"),
        ("late", 3, "HTTP 408"),
        ("failing", 3, "HTTP 500"),
        ("busy", 3, "HTTP 503"),
        ("limited", 3, "HTTP 429"),
        ("mute", 3, "timed out"),
        ("stall", 3, "timed out"),
        ("reset", 3, "reset by peer"),
        ("truncated", 3, f"truncated, {len(GOOD) // 2} of {len(GOOD)} bytes"),
        ("broken_chunks", 3, "IncompleteRead"),
        ("open", 1, f"not a whole gzip file: expected SHA-256 {GOOD_SHA256}"),
        ("garbage", 1, "this is not HTTP"),
        ("wrong", 1, f"expected SHA-256 {GOOD_SHA256} (60008 bytes), got {WRONG_SHA256}"),
        ("noise", 1, f"not a whole gzip file: expected SHA-256 {GOOD_SHA256}"),
        ("page", 1, "HTML page"),
        ("loop", 5, "redirect"),
        ("file_redirect", 1, "redirect"),
        ("bomb", 1, f"expected SHA-256 {GOOD_SHA256} (60008 bytes), got"),
        ("flood", 1, "more than the 61092 bytes"),
        ("boast", 1, "more than the 61092 bytes"),
    ],
)
def test_each_fault_is_told_and_leaves_nothing(
    tmp_path, target, server, monkeypatch, answer, requests, message
):
    if message == "timed out":
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with pytest.raises(DownloadError) as caught:
        get(tmp_path, server.url + answer)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert f"{server.url}{answer}/{LABELS}: " in text
    assert f"put it at {target}" in text
    assert len(server.paths) == requests
    assert not target.exists() and not leftovers(tmp_path)


def test_a_flood_is_cut_off_early(tmp_path, server):
    with pytest.raises(DownloadError):
        get(tmp_path, server.url + "flood")
    assert server.flooded < FLOOD_BYTES / 2  # no more than the sockets' buffers hold


def test_a_dribbling_server_does_not_hold_the_download_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "GRACE", 0.3)
    monkeypatch.setattr(download, "RETRIES", 0)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="too slow"):
        get(tmp_path, server.url + "dribble")
    assert 0.3 < time.monotonic() - start < 3  # the server takes ten seconds


def test_a_mirror_that_recovers_is_asked_again(tmp_path, target, server):
    get(tmp_path, server.url + "recovering")
    assert target.read_bytes() == GOOD
    assert server.paths == [f"/recovering/{LABELS}"] * 2


def test_the_pause_before_a_retry_doubles(tmp_path, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    monkeypatch.setattr(download, "BACKOFF", 3)
    with pytest.raises(DownloadError):
        get(tmp_path, server.url + "busy")
    assert pauses == [0, 3, 6]


@pytest.mark.parametrize("answer", ["absent", "busy", "wrong", "page", "loop", "stall", "bomb"])
def test_the_next_mirror_steps_in(tmp_path, target, server, monkeypatch, answer):
    mnist = download.DATASETS["mnist"]
    monkeypatch.setattr(download, "TIMEOUT", 1)
    monkeypatch.setattr(download, "RETRIES", 0)
    mirrors = (f"{server.url}{answer}/", f"{server.url}ok/", f"{server.url}wrong/")
    monkeypatch.setitem(download.DATASETS, "mnist", mnist._replace(mirrors=mirrors))
    get(tmp_path, None)
    assert target.read_bytes() == GOOD
    assert server.paths[-1] == f"/ok/{LABELS}" and not leftovers(tmp_path)


def test_the_users_mirror_comes_first_and_all_are_named_when_all_fail(
    tmp_path, server, monkeypatch
):
    mnist = download.DATASETS["mnist"]
    mirrors = (f"{server.url}absent/", f"{server.url}page/")
    monkeypatch.setitem(download.DATASETS, "mnist", mnist._replace(mirrors=mirrors))
    with pytest.raises(DownloadError) as caught:
        get(tmp_path, server.url + "forbidden")
    assert server.paths == [f"/{kind}/{LABELS}" for kind in ("forbidden", "absent", "page")]
    for reason in ("HTTP 403", "HTTP 404", "HTML page"):
        assert reason in str(caught.value)


def test_a_refused_connection_is_not_tried_again(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{free.getsockname()[1]}/"
        lines = []
        with pytest.raises(DownloadError, match="refused"):
            download.fetch("mnist", tmp_path, mirror, lines.append)
    assert sum("fetching" in line for line in lines) == 1


# Progress


def test_progress_off_a_terminal_is_a_few_lines():
    pieces = [(b"x", i + 1, 1000) for i in range(1000)]
    lines = []
    assert list(download._show_progress(iter(pieces), "f", lines.append)) == [b"x"] * 1000
    assert lines == ["f: 25%", "f: 50%", "f: 75%", "f: 100%"]


def test_progress_on_a_terminal_is_one_bar_that_ends_its_line(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    pieces = [(b"x", i + 1, 1000) for i in range(1000)]
    list(download._show_progress(iter(pieces), "f", pytest.fail))
    shown = terminal.getvalue()
    assert shown.count("\r") == 99 and shown.count("\n") == 1
    assert shown.endswith("f [" + "#" * 25 + "] 100%\n")


# Temporary files


def test_temporary_files_of_killed_downloads_go_once_they_are_stale(tmp_path, target, server):
    process = script(
        "mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}stall", files=slice(1, 2)
    )
    wait_for(lambda: leftovers(tmp_path))
    process.kill()
    process.communicate(timeout=15)
    (left,) = leftovers(tmp_path)
    get(tmp_path, server.url + "ok")
    assert leftovers(tmp_path) == [left]  # young: it could be a live download's
    two_hours_ago = time.time() - 7200
    os.utime(left, (two_hours_ago, two_hours_ago))
    get(tmp_path, None)
    assert not leftovers(tmp_path) and target.read_bytes() == GOOD


def test_an_interrupt_ends_with_130_and_leaves_nothing(tmp_path, server):
    process = script("mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}stall")
    wait_for(lambda: [path for path in leftovers(tmp_path) if "part" in path.name])
    process.send_signal(signal.SIGINT)
    assert failure(process, 130) == "download.py: interrupted\n"
    assert not leftovers(tmp_path)


def test_four_processes_at_once_end_with_one_good_copy(tmp_path, server):
    args = ("mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}ok/")
    processes = [script(*args) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=15)
        assert (process.returncode, err) == (0, "")
        assert out.count("verified") == 4
    stored = {path.name: path.read_bytes() for path in (tmp_path / "mnist").iterdir()}
    assert stored == {path.name: path.read_bytes() for path in (DATA / "mnist").glob("*.gz")}


# Disks that do not take it


def test_a_full_disk_is_one_line_and_nothing_is_half_written(tmp_path, target, server):
    target.parent.mkdir()
    target.write_bytes(DAMAGES["truncated"])
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    args = ("mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}ok/")
    err = failure(script(*args, setup=limit, files=slice(1, 2)))
    assert err.startswith(f"download.py: mnist: {target.parent}: ")
    assert target.read_bytes() == DAMAGES["truncated"] and not leftovers(tmp_path)


def test_a_read_only_folder_is_one_line(server):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        # argparse imports locale late, when the Python of another user may be unreadable.
        nobody = "import locale, os; os.geteuid() or os.seteuid(65534)"
        args = ("mnist", f"--data_dir={folder}", f"--mirror={server.url}ok/")
        assert "Permission denied" in failure(script(*args, setup=nobody))
        assert os.listdir(folder) == []
    assert server.paths == []


def test_a_file_in_place_of_the_data_folder_is_one_line_and_kept(tmp_path, server):
    path = tmp_path / "data"
    path.write_bytes(b"mine")
    err = failure(script("mnist", f"--data_dir={path}", f"--mirror={server.url}ok/"))
    assert "Not a directory" in err
    assert path.read_bytes() == b"mine"


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path, target, server):
    target.mkdir(parents=True)
    with pytest.raises(DownloadError, match="directory"):
        get(tmp_path, server.url + "ok")


# The command line


def test_a_failed_download_is_one_line_on_stderr(tmp_path, server):
    args = ("mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}absent")
    err = failure(script(*args))
    assert err.startswith("download.py: mnist: could not fetch train-images-idx3-ubyte.gz")
    assert "HTTP 404" in err and "by hand" in err


def test_several_sets_in_one_command(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setitem(download.DATASETS, "twin", download.DATASETS["mnist"])
    args = ["mnist", "twin", f"--data_dir={tmp_path}", f"--mirror={server.url}ok"]
    assert download.main(args) == 0
    assert capsys.readouterr().out.count(f"{LABELS} verified") == 2
    for name in ("mnist", "twin"):
        assert (tmp_path / name / LABELS).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: python download.py"),
        (["mnst"], "unknown data set 'mnst'; known are mnist, fashion_mnist, kmnist"),
        (["mnist", "cifar10"], "unknown data set 'cifar10'"),
        (["mnist", "--mirror=file:///etc"], "must be an http or https address"),
        (["mnist", "--mirror=ftp://host/x"], "must be an http or https address"),
        (["mnist", "--mirror=nonsense"], "must be an http or https address"),
        (["mnist", "--mirror=https://"], "must be an http or https address"),
        (["mnist", "--mirror=http://[::1"], "Invalid IPv6"),
        (["mnist", "--mirror"], "expected one argument"),
        (["mnist", "--dir=x"], "unrecognized arguments: --dir=x"),
        (["mnist", "--mirr=http://x/"], "unrecognized arguments"),
        (["mnist", "--a\nb"], "unrecognized arguments: --a b"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        download.main(args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert message in err and err.count("\n") == 1
    assert out == "" and os.listdir(tmp_path) == []


def test_the_script_itself_runs_on_the_standard_library_alone():
    command = [sys.executable, "-I", "-S", ROOT / "download.py", "mnst"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "download.py: unknown data set 'mnst'; known are mnist, fashion_mnist, kmnist\n"
    )
