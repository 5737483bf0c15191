"""A download server on the loopback interface that fails in every way a mirror can.

    with serving() as server:
        download.fetch("mnist", folder, f"{server.url}truncated/")

The address /FAULT/FILE answers with the fault, /ok/FILE with the tracked file of MNIST.
"""

import contextlib
import gzip
import http
import http.server
import os
import random
import socket
import struct
import threading

import utils

MNIST = utils.ROOT / "data" / "mnist"
LABELS = "train-labels-idx1-ubyte.gz"
GOOD = (MNIST / LABELS).read_bytes()
WRONG = gzip.compress(bytes(60008))  # as many bytes as the labels have, all zero
NOISE = random.Random(1).randbytes(1 << 16)
FLOOD_BYTES = 50_000_000  # more than any limit of a client; the end of a flood that nobody stops
DRIBBLE_BYTES = 500  # how much of a file is sent byte by byte
SECONDS = 20  # after which a silent server gives up


def response(body, status=200, length=None, version="1.0", **headers):
    """Return a response. `length` is what its header claims, by default the truth; -1: nothing."""
    if length != -1:
        headers["Content-Length"] = len(body) if length is None else length
    lines = [f"HTTP/{version} {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunks(body, size=9000):
    """Return the chunks of a body, each after its length, without the empty one at the end."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def chunked(data):
    """Return a response that claims to have chunks."""
    return response(data, length=-1, version="1.1", Transfer_Encoding="chunked")


def half(body):
    """Return the first half of a file."""
    return body[: len(body) // 2]


# What is sent at once, by the name of the fault: file -> bytes.
ANSWERS = {
    # Good answers
    "ok": response,
    "chunked": lambda body: chunked(chunks(body) + b"0\r\n\r\n"),
    # Status codes
    "forbidden": lambda body: response(b"go away", 403),
    "absent": lambda body: response(b"not here", 404),
    "limited": lambda body: response(b"later", 429),
    "busy": lambda body: response(b"later", 503),
    "file_redirect": lambda body: response(b"", 302, Location="file:///etc/hostname"),
    # Connections that end too early, and what is not HTTP
    "truncated": lambda body: response(half(body), length=len(body)),
    "open": lambda body: response(half(body), length=-1),
    "broken_chunks": lambda body: chunked(chunks(body, len(body))[:100]),
    "garbage": lambda body: b"this is not HTTP\r\n\r\n",
    # Wrong contents
    "wrong": lambda body: response(WRONG),
    "noise": lambda body: response(NOISE[:5000]),
    "page": lambda body: response(b"\n<!DOCTYPE html><title>Log in to the network</title>"),
    "bomb": lambda body: response(gzip.compress(bytes(50_000_000))),  # large once decompressed
    "boast": lambda body: response(body, length=10**12),
}


class Server(http.server.ThreadingHTTPServer):
    """A server that remembers what it was asked for.

    Attributes:
        paths: the paths requested so far.
        over: Event that ends all slow answers.
        flooded: bytes sent by /flood.
        url: address of the server, with a slash at its end.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths, self.over, self.flooded = [], threading.Event(), 0
        self.url = f"http://127.0.0.1:{self.server_port}/"


@contextlib.contextmanager
def serving():
    """Run a Server in a thread while the block is running, and yield it."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer /FAULT/FILE by what ANSWERS has, or by the method answer_FAULT."""

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        """Answer a request."""
        self.server.paths.append(self.path)
        fault, name = self.path.strip("/").split("/")
        body = (MNIST / name).read_bytes()
        if fault in ANSWERS:
            self.wfile.write(ANSWERS[fault](body))
        else:
            getattr(self, f"answer_{fault}")(body)

    def log_message(self, *args):
        """Log nothing."""

    def answer_recovering(self, body):
        """Fail the first request for a path, and then send the file."""
        first = self.server.paths.count(self.path) == 1
        self.wfile.write(response(b"later", 503) if first else response(body))

    def answer_loop(self, body):
        """Redirect to the same address."""
        self.wfile.write(response(b"", 302, Location=self.path))

    def answer_mute(self, body):
        """Send nothing."""
        self.server.over.wait(SECONDS)

    def answer_stall(self, body):
        """Send half of the file, and then nothing."""
        self.wfile.write(response(half(body), length=len(body)))
        self.server.over.wait(SECONDS)

    def answer_dribble(self, body):
        """Send the file byte by byte."""
        self.wfile.write(response(b"", length=len(body)))
        for byte in body[:DRIBBLE_BYTES]:
            self.wfile.write(bytes([byte]))
            if self.server.over.wait(0.02):
                return

    def answer_reset(self, body):
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        os.close(self.connection.detach())

    def answer_flood(self, body):
        """Send random bytes without an announced end, up to FLOOD_BYTES."""
        self.wfile.write(response(b"", length=-1))
        while self.server.flooded < FLOOD_BYTES and not self.server.over.is_set():
            try:
                self.wfile.write(NOISE)
            except OSError:  # the client has closed the connection
                return
            self.server.flooded += len(NOISE)
