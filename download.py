"""Fetch and verify the data sets: python download.py mnist [fashion_mnist kmnist ...].

An intact file is left alone. Any other is fetched from the mirrors in turn into a temporary file in
the same folder, checked against its known SHA-256, and only then renamed. Only the standard library
is needed, and what is fetched is only hashed, never executed or unpickled.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import os
import secrets
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 10  # seconds that connecting to an address, or waiting for the next bytes, may take
GRACE = 30  # seconds after which a transfer must keep the rate
MIN_RATE = 4096  # bytes a second on average
RETRIES = 2  # further tries of an address after temporary faults
BACKOFF = 1  # seconds before the first retry; twice as many before each next one
STALE = 3600  # seconds without a write after which a temporary file is abandoned
CHUNK = 1 << 18  # bytes read at a time


class DownloadError(Exception):
    """A file is damaged, or could not be fetched or stored; the message is one line."""


class _PassingError(DownloadError):
    """A fault of the network or the server that is worth another try."""


class File(NamedTuple):
    """One file of a data set, and its expected contents."""

    name: str  # on the mirrors and on disk
    size: int  # bytes of what is hashed
    sha256: str  # of the decompressed bytes, or of the .gz itself where `packed`
    packed: bool


class Source(NamedTuple):
    """The files of a data set, and where they can be found."""

    mirrors: tuple[str, ...]
    files: tuple[File, ...]


def _files(sizes: tuple[int, ...], hashes: str, packed: bool) -> tuple[File, ...]:
    names = (
        f"{split}-{kind}-ubyte.gz"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    return tuple(File(*row, packed) for row in zip(names, sizes, hashes.split(), strict=True))


IDX_SIZES = (47040016, 60008, 7840016, 10008)
MNIST_SHA256 = """
    ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
    65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
    0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
    ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"""
FASHION_SHA256 = """
    c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
    bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
    5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
    0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"""
KMNIST_GZ_SIZES = (18165135, 29497, 3041136, 5120)
KMNIST_GZ_SHA256 = """
    51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4
    e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17
    edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5
    20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"""

DATASETS = {
    "mnist": Source(
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        _files(IDX_SIZES, MNIST_SHA256, packed=False),
    ),
    "fashion_mnist": Source(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        _files(IDX_SIZES, FASHION_SHA256, packed=False),
    ),
    "kmnist": Source(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        _files(KMNIST_GZ_SIZES, KMNIST_GZ_SHA256, packed=True),
    ),
}


def fetch(name: str, data_dir="data", mirror: str | None = None, report=print) -> Path:
    """Make sure that all files of a data set are on disk and intact; fetch those that are not.

    Args:
        name: a key of `DATASETS`.
        data_dir: folder with one folder for each data set.
        mirror: http(s) address of a folder with the files, to try before the known mirrors.
        report: called with each line of progress.

    Returns:
        The folder of the data set.

    Raises:
        DownloadError: no mirror has an intact file, or a file could not be read or written.
        ValueError: `name` is unknown, or `mirror` is not an http(s) address.
    """
    addresses = _mirrors(name, mirror)
    folder = Path(data_dir) / name
    _remove_stale(folder)
    try:
        for file in DATASETS[name].files:
            path = _path_on_disk(folder, file)
            try:
                verify(path, file)
            except (FileNotFoundError, DownloadError) as error:
                state = f"damaged, {error}" if isinstance(error, DownloadError) else "missing"
                report(f"{name}: {path.name} {state}")
                path = folder / file.name
                folder.mkdir(parents=True, exist_ok=True)
                _fetch_file([base + file.name for base in addresses], path, file, report)
            report(f"{name}: {path.name} verified (SHA-256 {file.sha256[:12]}...)")
    except OSError as error:
        raise DownloadError(f"{name}: {error.filename or folder}: {_one_line(error)}") from error
    return folder


def _path_on_disk(folder: Path, file: File) -> Path:
    """Return where a file is: gzipped, as it is fetched, or else unpacked, if that can be verified.

    Some archives have a dot where the original has a hyphen.
    """
    path = folder / file.name
    unpacked = [path.with_suffix(""), folder / path.stem.replace("-idx", ".idx")]
    if path.exists() or file.packed:
        return path
    return next((other for other in unpacked if other.exists()), path)


def verify(path, file: File) -> None:
    """Check that the file at `path`, gzipped or not, is `file`, byte for byte.

    Read in small pieces and stop past the expected size, so that no input can fill the memory.

    Raises:
        DownloadError: it is not; the message has the expected SHA-256 and the actual one.
        OSError: it is missing or cannot be read.
    """
    digest, size, fault = hashlib.sha256(), 0, "not the right contents"
    try:
        unpacks = Path(path).suffix in (".gz", ".part") and not file.packed
        with gzip.open(path) if unpacks else open(path, "rb") as stream:
            while size <= file.size and (chunk := stream.read(CHUNK)):
                digest.update(chunk)
                size += len(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        fault = "not a whole gzip file"
    else:
        if size == file.size and digest.hexdigest() == file.sha256:
            return
    raise DownloadError(
        f"{fault}: expected SHA-256 {file.sha256} ({file.size} bytes), "
        f"got {digest.hexdigest()} ({size} bytes read)"
    )


def _mirrors(name: str, mirror: str | None) -> list[str]:
    """Return the addresses of the folders to try for a data set, the user's mirror first."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    if mirror is None:
        return list(DATASETS[name].mirrors)
    parts = urllib.parse.urlsplit(mirror)
    if parts.scheme not in ("http", "https") or not parts.hostname or not mirror.isascii():
        raise ValueError(f"the mirror must be an http or https address, received {mirror!r}")
    return [mirror.rstrip("/") + "/", *DATASETS[name].mirrors]


def _fetch_file(urls: list[str], path: Path, file: File, report) -> None:
    """Fetch one file from the first address that has it intact."""
    faults = {}
    for url in urls:
        for attempt in range(RETRIES + 1):
            time.sleep(BACKOFF * 2 ** (attempt - 1) if attempt else 0)
            report(f"{file.name}: fetching {url}")
            try:
                return _fetch_url(url, path, file, report)
            except DownloadError as error:
                faults[url] = error
                report(f"{file.name}: {error}")
                if not isinstance(error, _PassingError):
                    break
    raise DownloadError(
        f"{path.parent.name}: could not fetch {file.name} "
        f"({'; '.join(f'{url}: {fault}' for url, fault in faults.items())}); by hand: get it from "
        f"one of these addresses where there is a network, and put it at {path.absolute()}"
    )


def _fetch_url(url: str, path: Path, file: File, report) -> None:
    """Fetch a file from one address. Replace `path` only after it has been verified."""
    # However badly it compresses, gzip adds less than a thousandth and a header.
    limit = file.size if file.packed else file.size + file.size // 1000 + 1024
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as out:
            out.writelines(_show_progress(_receive(url, limit), file.name, report))
            out.flush()
            os.fsync(out.fileno())
        verify(temporary, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _receive(url: str, limit: int):
    """Yield the body of `url` piece by piece, each as (bytes, bytes so far, total or None)."""
    start, done = time.monotonic(), 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "capsnet-download"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            total = None if length is None else int(length)
            # read1 returns what has come, where read would wait until a chunk is full.
            while chunk := response.read1(CHUNK):
                if not done and chunk.lstrip().startswith(b"<"):
                    raise DownloadError("answered with an HTML page")
                done += len(chunk)
                seconds = time.monotonic() - start
                if max(done, total or 0) > limit:
                    raise DownloadError(f"sends more than the {limit} bytes that it may have")
                if seconds > GRACE and done < MIN_RATE * seconds:
                    raise _PassingError(f"too slow, {done} bytes in {seconds:.0f} s")
                yield chunk, done, total
            if total is not None and done < total:
                raise _PassingError(f"truncated, {done} of {total} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        passing = error.code >= 500 or error.code in (408, 429)
        note = ", a redirect that leads nowhere" if 300 <= error.code < 400 else ""
        raise (_PassingError if passing else DownloadError)(f"HTTP {error.code}{note}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        lost = (ConnectionResetError, BrokenPipeError, http.client.IncompleteRead)
        # A time-out wrapped in a URLError is not worth a retry: no address of the host connects.
        passing = isinstance(cause, lost) or isinstance(error, TimeoutError)
        raise (_PassingError if passing else DownloadError)(_one_line(cause)) from None


def _show_progress(pieces, label: str, report):
    """Yield the bytes of pieces and show how many: a bar on a terminal, else a line a quarter."""
    shown = 0
    for chunk, done, total in pieces:
        percent = 100 * done // total if total else 0
        if sys.stderr.isatty() and percent > shown:
            shown, end = percent, "\r" if done < total else "\n"
            bar = f"{label} [{'#' * (percent // 4):25}] {percent:3}%"
            print(bar, end=end, file=sys.stderr, flush=True)
        elif percent // 25 > shown // 25:
            shown = percent
            report(f"{label}: {percent}%")
        yield chunk


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of killed downloads; those of live ones are younger than STALE."""
    for old in folder.glob(".*.gz.*.part"):
        with contextlib.suppress(OSError):  # another process may be tidying up as well
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()


def _one_line(error) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failed), 2 (usage) or 130 (Ctrl-C)."""
    usage = "python download.py [--mirror=URL] [--data_dir=DIR] NAME..."
    parser = _Parser("download.py", usage, allow_abbrev=False)
    known = ", ".join(DATASETS)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"data set to verify or fetch: {known}"
    )
    parser.add_argument("--mirror", metavar="URL", help="http(s) folder to try first")
    folder_help = "folder of the data sets; default: data"
    parser.add_argument("--data_dir", default="data", metavar="DIR", help=folder_help)
    args = parser.parse_args(argv)
    folder = os.path.expanduser(args.data_dir)
    if not args.names:
        parser.exit(2, parser.format_usage())
    try:
        for name in args.names:
            _mirrors(name, args.mirror)
        for name in args.names:
            fetch(name, folder, args.mirror, lambda line: print(line, flush=True))
    except ValueError as error:
        parser.error(str(error))
    except DownloadError as error:
        print(f"{parser.prog}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
