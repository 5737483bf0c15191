"""download.py against a local server that fails in every way a mirror can."""

import errno
import gzip
import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from benchmark_lib.faulty_server import FLOOD_BYTES, GOOD, LABELS, WRONG, serving

import download
from download import DownloadError

ROOT = Path(__file__).resolve().parent.parent
DATASETS = dict(download.DATASETS)
SHA256 = "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
WRONG_SHA256 = hashlib.sha256(bytes(60008)).hexdigest()
VERIFIED = f"mnist: {LABELS} verified (SHA-256 65a50cbbf4e9...)\n"


@pytest.fixture
def server():
    with serving() as server:
        server.handle_error = lambda *_: None  # some faults cut the connection on purpose
        yield server


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No built-in mirror, no proxy, one file to fetch, and short waits."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(download.DATASETS, "mnist", download.Source((), {LABELS: SHA256}))
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 5)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "mnist" / LABELS


def stored(folder):
    """The contents of all files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use_mirrors(monkeypatch, *mirrors):
    source = download.DATASETS["mnist"]._replace(mirrors=mirrors)
    monkeypatch.setitem(download.DATASETS, "mnist", source)


# What is on disk


def test_the_tracked_files_of_mnist_verify_without_a_request(monkeypatch, capsys):
    monkeypatch.setitem(download.DATASETS, "mnist", DATASETS["mnist"]._replace(mirrors=()))
    assert download.main(["mnist", f"--data_dir={ROOT / 'data'}"]) == 0
    out, err = capsys.readouterr()
    assert (out.count(" verified "), out.count("\n"), err) == (4, 4, "")
    assert out.startswith("mnist: train-images-idx3-ubyte.gz verified (SHA-256 ba891046")


def test_every_set_has_the_four_files_of_mnist_and_distinct_hashes():
    for source in DATASETS.values():
        assert set(source.sha256) == {path.name for path in (ROOT / "data/mnist").glob("*.gz")}
    hashes = [sha256 for source in DATASETS.values() for sha256 in source.sha256.values()]
    assert len(set(hashes)) == 12 and all(len(bytes.fromhex(sha256)) == 32 for sha256 in hashes)
    assert [name for name in DATASETS if not DATASETS[name].unpack] == ["kmnist"]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_good_file_is_left_alone_however_it_is_compressed(tmp_path, target, capsys, level):
    target.parent.mkdir()
    raw = gzip.decompress(GOOD)
    halves = gzip.compress(raw[:30000], level) + gzip.compress(raw[30000:], level)
    target.write_bytes(halves)
    before = target.stat()
    download.fetch("mnist", tmp_path)
    assert capsys.readouterr().out == VERIFIED
    assert target.read_bytes() == halves
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("name", [LABELS[:-3], LABELS[:-3].replace("-idx", ".idx")])
def test_an_unpacked_file_is_verified_and_replaced_only_if_it_is_damaged(
    tmp_path, target, server, capsys, name
):
    path = target.parent / name
    path.parent.mkdir()
    path.write_bytes(gzip.decompress(GOOD))
    download.fetch("mnist", tmp_path)
    assert capsys.readouterr().out == VERIFIED.replace(LABELS, name)
    assert set(stored(tmp_path)) == {name}
    path.write_bytes(gzip.decompress(GOOD)[:-1])
    download.fetch("mnist", tmp_path, server.url + "ok/")
    assert capsys.readouterr().out.startswith(f"mnist: {name} damaged")
    assert target.read_bytes() == GOOD  # which is read before the unpacked one


def test_a_file_that_is_known_as_it_is_compressed_must_be_the_same(tmp_path, target, monkeypatch):
    source = download.Source((), {LABELS: hashlib.sha256(GOOD).hexdigest()}, unpack=False)
    monkeypatch.setitem(download.DATASETS, "mnist", source)
    target.parent.mkdir()
    target.write_bytes(GOOD)
    download.fetch("mnist", tmp_path)
    target.write_bytes(gzip.compress(gzip.decompress(GOOD), 1))
    with pytest.raises(DownloadError):
        download.fetch("mnist", tmp_path)


def test_a_bomb_on_disk_does_not_fill_the_memory():
    bomb = io.BytesIO(gzip.compress(bytes(20_000_000)) * 50)  # a gigabyte
    tracemalloc.start()
    with pytest.raises(DownloadError, match=SHA256) as caught:
        download.verify(bomb, SHA256, unpack=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert int(re.search(r"(\d+) bytes read", str(caught.value))[1]) < 51_000_000


def other_bytes():
    raw = bytearray(gzip.decompress(GOOD))
    raw[5000] ^= 1
    return gzip.compress(bytes(raw))  # its own CRC is right


DAMAGES = {
    "flipped": GOOD[:9000] + bytes([GOOD[9000] ^ 4]) + GOOD[9001:],
    "other bytes": other_bytes(),
    "more after it": GOOD + gzip.compress(b"more"),
    "not deflated": gzip.compress(b"")[:10] + bytes([255] * 100),
    "truncated": GOOD[:-2000],
    "without its checksum": GOOD[:-8],
    "empty": b"",
    "a page": b"<html>log in</html>",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_stays_until_a_good_one_is_there(
    tmp_path, target, server, capsys, damage
):
    target.parent.mkdir()
    target.write_bytes(damage)
    with pytest.raises(DownloadError):
        download.fetch("mnist", tmp_path, server.url + "wrong/")
    assert stored(tmp_path) == {LABELS: damage}
    download.fetch("mnist", tmp_path, server.url + "ok/")
    assert stored(tmp_path) == {LABELS: GOOD}
    assert server.paths == [f"/wrong/{LABELS}", f"/ok/{LABELS}"]
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert lines[0].startswith(f"mnist: {LABELS} damaged") and SHA256 in lines[0]
    assert lines[-1] == VERIFIED


# What mirrors answer


@pytest.mark.parametrize("answer", ["ok", "chunked", "recovering"])
def test_a_missing_file_is_fetched_and_has_the_permissions_of_any_new_file(
    tmp_path, target, server, monkeypatch, capsys, answer
):
    monkeypatch.setattr(download, "MIN_RATE", 1e12)  # which nothing has to keep at the beginning
    download.fetch("mnist", tmp_path, f"{server.url}{answer}/")
    out = capsys.readouterr().out
    assert out.startswith(f"mnist: {LABELS} missing\n") and out.endswith(VERIFIED)
    assert stored(tmp_path) == {LABELS: GOOD}
    assert len(server.paths) == (2 if answer == "recovering" else 1)
    (tmp_path / "other").touch()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        ("forbidden", 1, "HTTP Error 403"),
        ("absent", 1, "HTTP Error 404"),
        ("busy", 3, "HTTP Error 503"),
        ("limited", 3, "HTTP Error 429"),
        ("mute", 3, "timed out"),
        ("stall", 3, "timed out"),
        ("dribble", 3, "too slow"),
        ("reset", 3, "reset by peer"),
        ("truncated", 3, f"IncompleteRead({len(GOOD) // 2} bytes read, {len(GOOD) // 2 + 1} more"),
        ("broken_chunks", 3, "IncompleteRead"),
        ("open", 1, f"not a whole gzip file: expected SHA-256 {SHA256}"),
        ("garbage", 1, "this is not HTTP"),
        ("wrong", 1, f"contents: expected SHA-256 {SHA256}, got {WRONG_SHA256} (60008 bytes read)"),
        ("noise", 1, f"not a whole gzip file: expected SHA-256 {SHA256}"),
        ("page", 1, "HTML page"),
        ("loop", 5, "redirect"),
        ("file_redirect", 1, "HTTP Error 302"),
        ("bomb", 1, f"expected SHA-256 {SHA256}, got"),
        ("flood", 1, "more than the 1000000 bytes"),
        ("boast", 1, "more than the 1000000 bytes"),
    ],
)
def test_each_fault_is_told_and_leaves_nothing(
    tmp_path, target, server, monkeypatch, answer, requests, message
):
    monkeypatch.setattr(download, "LIMIT", 1_000_000)
    if message == "timed out":
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
    if message == "too slow":
        monkeypatch.setattr(download, "GRACE", 0.1)
    start = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        download.fetch("mnist", tmp_path, f"{server.url}{answer}/")
    assert time.monotonic() - start < 5  # a server that dribbles takes ten seconds
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert f"{server.url}{answer}/{LABELS}: " in text
    assert f"put it at {target}" in text
    assert len(server.paths) == requests
    assert server.flooded < FLOOD_BYTES / 2  # no more than the sockets' buffers hold
    assert os.listdir(tmp_path) == []  # no empty folder either


def test_the_pauses_before_retries_grow(tmp_path, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    monkeypatch.setattr(download, "BACKOFF", 3)
    with pytest.raises(DownloadError):
        download.fetch("mnist", tmp_path, server.url + "busy/")
    assert pauses == [0, 3, 6]


@pytest.mark.parametrize("answer", ["absent", "busy", "wrong", "loop", "stall"])
def test_the_next_mirror_steps_in(tmp_path, server, monkeypatch, answer):
    monkeypatch.setattr(download, "TIMEOUT", 1)
    monkeypatch.setattr(download, "RETRIES", 0)
    use_mirrors(monkeypatch, *(f"{server.url}{kind}/" for kind in (answer, "ok", "wrong")))
    download.fetch("mnist", tmp_path)
    assert stored(tmp_path) == {LABELS: GOOD}
    assert server.paths[-1] == f"/ok/{LABELS}"


def test_the_users_mirror_comes_first_and_all_are_named_when_all_fail(
    tmp_path, server, monkeypatch, capsys
):
    use_mirrors(monkeypatch, f"{server.url}absent/", f"{server.url}page/")
    args = ["mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}forbidden"]
    assert download.main(args) == 1
    assert server.paths == [f"/{kind}/{LABELS}" for kind in ("forbidden", "absent", "page")]
    err = capsys.readouterr().err
    assert err.startswith(f"download.py: mnist: could not fetch {LABELS} (")
    assert err.count("\n") == 1 and "by hand" in err
    for reason in ("HTTP Error 403", "HTTP Error 404", "HTML page"):
        assert reason in err


def test_a_refused_connection_is_not_tried_again(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{free.getsockname()[1]}/"
        with pytest.raises(DownloadError, match=r": Connection refused\)"):
            download.fetch("mnist", tmp_path, mirror)
    assert capsys.readouterr().out.count("fetching") == 1


# Progress


def test_progress_off_a_terminal_is_a_line_a_quarter(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(download, "CHUNK", 100)
    download.fetch("mnist", tmp_path, server.url + "ok/")
    lines = capsys.readouterr().out.splitlines()[2:-1]
    assert lines == [f"{LABELS}: {percent}%" for percent in (25, 50, 75, 100)]


def test_progress_on_a_terminal_is_one_bar_that_ends_its_line(
    tmp_path, server, monkeypatch, capsys
):
    monkeypatch.setattr(download, "CHUNK", 100)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download.fetch("mnist", tmp_path, server.url + "ok/")
    out, err = capsys.readouterr()
    assert "%" not in out
    assert (err.count("\r"), err.count("\n")) == (99, 1)
    assert err.endswith(f"{LABELS} [{'#' * 25}] 100%\n")


# Writing


def test_a_file_is_synced_to_disk_before_it_takes_its_name(target, monkeypatch):
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
    download._write(target, b"short enough for a buffer")
    whole_file = target.stat().st_ino, 25
    assert calls == [("fsync", *whole_file), ("replace", *whole_file)]


def test_four_at_once_end_with_one_good_copy(tmp_path, server):
    with ThreadPoolExecutor(4) as pool:
        fetches = [
            pool.submit(download.fetch, "mnist", tmp_path, server.url + "ok/") for _ in range(4)
        ]
    assert [fetch.exception() for fetch in fetches] == [None] * 4
    assert stored(tmp_path) == {LABELS: GOOD}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left\non device"), 1, "No space left on device\n"),
        (KeyboardInterrupt(), 130, "download.py: interrupted\n"),
    ],
)
def test_a_full_disk_and_ctrl_c_are_one_line_and_leave_nothing_half_written(
    tmp_path, target, server, monkeypatch, capsys, error, code, said
):
    target.parent.mkdir()
    target.write_bytes(WRONG)

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    args = ["mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}ok/"]
    assert download.main(args) == code
    err = capsys.readouterr().err
    assert err.startswith("download.py: ") and err.endswith(said) and err.count("\n") == 1
    assert stored(tmp_path) == {LABELS: WRONG}


@pytest.mark.parametrize(("blocked", "said"), [("", "Not a directory"), (LABELS, "Is a directory")])
def test_what_is_in_the_way_is_one_line_and_kept(tmp_path, target, server, capsys, blocked, said):
    if blocked:
        target.mkdir(parents=True)
    else:
        target.parent.write_bytes(b"mine")
    assert download.main(["mnist", f"--data_dir={tmp_path}", f"--mirror={server.url}ok/"]) == 1
    assert capsys.readouterr().err == f"download.py: mnist: {target}: {said}\n"
    assert target.is_dir() if blocked else target.parent.read_bytes() == b"mine"


# The command line


def test_several_sets_in_one_command(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setitem(download.DATASETS, "twin", download.DATASETS["mnist"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.main(["mnist", "twin", "--data_dir=~/x", f"--mirror={server.url}ok"]) == 0
    assert capsys.readouterr().out.count(f"{LABELS} verified") == 2
    for name in ("mnist", "twin"):
        assert (tmp_path / "x" / name / LABELS).read_bytes() == GOOD


def test_help_lists_the_data_sets_and_the_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        download.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for word in (*DATASETS, "--mirror", "--data_dir", "usage: python download.py"):
        assert word in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected names of data sets: mnist, fashion_mnist, kmnist; see --help"),
        (["mnst"], "unknown data set 'mnst'; known are mnist, fashion_mnist, kmnist"),
        (["mnist", "cifar10"], "unknown data set 'cifar10'"),
        (["mnist", "--mirror=file:///etc"], "'file:///etc' is not an http or https address"),
        (["mnist", "--mirror=ftp://host/x"], "is not an http or https address"),
        (["mnist", "--mirror=nonsense"], "is not an http or https address"),
        (["mnist", "--mirror=https://"], "is not an http or https address"),
        (["mnist", "--mirror=http://a b/"], "is not an http or https address"),
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
    command = [sys.executable, "-I", "-S", ROOT / "download.py", "mnist", "--data_dir", "data"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("verified") == 4
