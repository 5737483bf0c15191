"""Fetch and verify the data sets: python download.py mnist [fashion_mnist kmnist ...].

An intact file is left alone. Any other is fetched from the mirrors in turn, checked against its
known SHA-256, written under a temporary name in the same folder, and only then renamed. Only the
standard library is needed, and what is fetched is only hashed, never executed or unpickled.
"""

import argparse
import gzip
import hashlib
import http.client
import io
import os
import re
import secrets
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 10  # seconds that connecting to an address, or waiting for the next bytes, may take
GRACE = 30  # seconds after which a transfer must keep the rate
MIN_RATE = 4096  # bytes a second on average
RETRIES = 2  # further tries of an address after temporary faults
BACKOFF = 1  # seconds before the first retry, and as many more before each next one
LIMIT = 48 << 20  # bytes; no file is larger, compressed or not
CHUNK = 1 << 18  # bytes read at a time
# Faults worth another try. A connection that times out is a URLError instead, and not among them.
TEMPORARY = (ConnectionResetError, BrokenPipeError, TimeoutError, http.client.IncompleteRead)
TEMPORARY_STATUS = (408, 429, *range(500, 600))


class DownloadError(Exception):
    """A file is damaged, or could not be fetched or stored; the message is one line."""


class Source(NamedTuple):
    """Where the files of a data set can be found, and what they contain."""

    mirrors: tuple  # addresses of folders
    sha256: dict  # name of a file -> SHA-256 of its decompressed contents, equal on all mirrors
    unpack: bool = True  # False: SHA-256 of the .gz files themselves


def _files(*sha256):
    names = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    return dict(zip((f"{s}-{n}" for s in ("train", "t10k") for n in names), sha256, strict=True))


DATASETS = {
    "mnist": Source(
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        _files(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion_mnist": Source(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        _files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "kmnist": Source(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        _files(
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
        unpack=False,
    ),
}


def fetch(name, data_dir="data", mirror=None):
    """Make sure that all files of a data set are on disk and intact; fetch those that are not.

    Args:
        name: a key of `DATASETS`.
        data_dir: folder with one folder for each data set.
        mirror: address, with a slash at its end, of a folder with the files; it is tried first.

    Raises:
        DownloadError: no mirror has an intact file, or a file could not be read or written.
    """
    source, folder = DATASETS[name], Path(data_dir) / name
    mirrors = (mirror, *source.mirrors) if mirror else source.mirrors
    try:
        for file, sha256 in source.sha256.items():
            path = _path_on_disk(folder / file, source.unpack)
            try:
                with open(path, "rb") as stream:
                    verify(stream, sha256, source.unpack and path.suffix == ".gz")
            except (FileNotFoundError, DownloadError) as error:
                state = f"damaged, {error}" if isinstance(error, DownloadError) else "missing"
                print(f"{name}: {path.name} {state}", flush=True)
                path = folder / file
                _write(path, _fetch_file(path, mirrors, sha256, source.unpack))
            print(f"{name}: {path.name} verified (SHA-256 {sha256[:12]}...)", flush=True)
    except OSError as error:
        raise DownloadError(f"{name}: {error.filename or folder}: {_one_line(error)}") from error


def _path_on_disk(path, unpack):
    """Return where a file is: as it is fetched, or else unpacked, maybe with a dot before "idx"."""
    names = [path.name, path.stem, path.stem.replace("-idx", ".idx")] if unpack else [path.name]
    return next((other for other in map(path.with_name, names) if other.exists()), path)


def verify(stream, sha256, unpack):
    """Check the SHA-256 of a file, or of what it decompresses to if `unpack`.

    Read in small pieces, up to LIMIT, so that no input can fill the memory.

    Raises:
        DownloadError: it is another one; the message has both.
    """
    digest, size, fault = hashlib.sha256(), 0, "not the right contents"
    unpacked = gzip.GzipFile(fileobj=stream) if unpack else stream
    try:
        while size <= LIMIT and (chunk := unpacked.read(CHUNK)):
            digest.update(chunk)
            size += len(chunk)
        if digest.hexdigest() == sha256:
            return
    except (gzip.BadGzipFile, EOFError, zlib.error):
        fault = "not a whole gzip file"
    got = f"{digest.hexdigest()} ({size} bytes read)"
    raise DownloadError(f"{fault}: expected SHA-256 {sha256}, got {got}")


def _write(path, content):
    """Write a file, which takes its name once all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fetch_file(path, mirrors, sha256, unpack):
    """Return the contents of a file from the first mirror that has it intact."""
    faults = []
    for url in (mirror + path.name for mirror in mirrors):
        for attempt in range(RETRIES + 1):
            time.sleep(BACKOFF * attempt)
            print(f"{path.name}: fetching {url}", flush=True)
            try:
                content = _receive(url, path.name)
                verify(io.BytesIO(content), sha256, unpack)
                return content
            except (DownloadError, OSError, http.client.HTTPException, ValueError) as error:
                fault, code = _one_line(error), getattr(error, "code", None)
                print(f"{path.name}: {fault}", flush=True)
                if not isinstance(error, TEMPORARY) and code not in TEMPORARY_STATUS:
                    break
        faults.append(f"{url}: {fault}")
    raise DownloadError(
        f"{path.parent.name}: could not fetch {path.name} ({'; '.join(faults)}); by hand: get it "
        f"from one of these addresses where there is a network, and put it at {path.absolute()}"
    )


def _receive(url, label):
    """Return the body of `url`, and show the progress."""
    start, body, shown = time.monotonic(), bytearray(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "capsnet-download"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        total = int(response.headers.get("Content-Length", 0))
        # read1 returns what has come, where read would wait until a chunk is full.
        while chunk := response.read1(CHUNK):
            body += chunk
            seconds = time.monotonic() - start
            if max(len(body), total) > LIMIT:
                raise DownloadError(f"sends more than the {LIMIT} bytes that it may have")
            if seconds > GRACE and len(body) < MIN_RATE * seconds:
                raise TimeoutError(f"too slow, {len(body)} bytes in {seconds:.0f} s")
            if total:
                shown = _show_progress(label, 100 * len(body) // total, shown)
    if len(body) < total:
        raise http.client.IncompleteRead(body, total - len(body))
    if body[:100].lstrip().startswith(b"<"):
        raise DownloadError("answered with an HTML page")
    return body


def _show_progress(label, percent, shown):
    """Show a bar on a terminal, else a line a quarter. Return the percentage reached."""
    if sys.stderr.isatty() and percent > shown:
        bar = f"{label} [{'#' * (percent // 4):25}] {percent:3}%"
        print(bar, end="\r" if percent < 100 else "\n", file=sys.stderr, flush=True)
    elif percent // 25 > shown // 25:
        print(f"{label}: {percent}%", flush=True)
    return percent


def _one_line(error):
    """Return what an error says, in one line."""
    if type(error) is urllib.error.URLError:
        error = error.reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _data_set(text):
    if text in DATASETS:
        return text
    raise argparse.ArgumentTypeError(f"unknown data set {text!r}; known are {', '.join(DATASETS)}")


def _address(text):
    if re.fullmatch(r"(?i)https?://[!-.0-~][!-~]*", text):
        return text.rstrip("/") + "/"
    raise argparse.ArgumentTypeError(f"{text!r} is not an http or https address")


def main(argv=None):
    """Run the command line and return its exit code: 0, 1 (failed), 2 (usage) or 130 (Ctrl-C)."""
    usage = "python download.py [--mirror=URL] [--data_dir=DIR] NAME..."
    parser = _Parser("download.py", usage, allow_abbrev=False)
    add, known = parser.add_argument, f"data sets: {', '.join(DATASETS)}"
    add("names", nargs="*", type=_data_set, metavar="NAME", help=f"to verify or fetch; {known}")
    add("--mirror", type=_address, metavar="URL", help="http(s) folder to try first")
    folder_help = "folder of the data sets; default: data"
    add("--data_dir", type=os.path.expanduser, default="data", metavar="DIR", help=folder_help)
    args = parser.parse_args(argv)
    if not args.names:
        parser.error(f"expected names of {known}; see --help")
    try:
        for name in args.names:
            fetch(name, args.data_dir, args.mirror)
    except DownloadError as error:
        print(f"{parser.prog}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
