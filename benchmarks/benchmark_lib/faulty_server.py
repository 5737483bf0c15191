"""A download server on the loopback interface that fails in every way a mirror can.

    with serving() as server:
        download.fetch("mnist", folder, f"{server.url}truncated/")

The address /FAULT/FILE answers with the fault, /ok/FILE with the tracked file of MNIST.
"""

import contextlib
import gzip
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
BOMB = gzip.compress(bytes(50_000_000))
FLOOD_BYTES = 50_000_000  # more than any limit of a client; the end of a flood that nobody stops
DRIBBLE_BYTES = 500  # how much of a file is sent byte by byte
SECONDS = 20  # after which a silent server gives up
# Faults that are a body and a status.
ANSWERS = {
    "forbidden": (b"go away", 403),
    "absent": (b"not here", 404),
    "late": (b"too slow", 408),
    "limited": (b"later", 429),
    "failing": (b"oops", 500),
    "busy": (b"later", 503),
    "wrong": (WRONG, 200),
    "noise": (random.Random(1).randbytes(5000), 200),
    "page": (b"\n<!DOCTYPE html><title>Log in to the network</title>", 200),
    "bomb": (BOMB, 200),  # few bytes that decompress to many
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
        if fault in ANSWERS:
            self.send(*ANSWERS[fault])
        else:
            getattr(self, f"answer_{fault}")((MNIST / name).read_bytes())

    def log_message(self, *args):
        """Log nothing."""

    def send(self, body, status=200, length=None, **headers):
        """Send a whole response. `length` is what the header claims, by default the truth."""
        self.send_response(status)
        self.send_header("Content-Length", len(body) if length is None else length)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    # --- Good answers -----------------------------------------------------------------------------

    def answer_ok(self, body):
        """Send the file."""
        self.send(body)

    def answer_chunked(self, body):
        """Send the file in chunks."""
        self._start_chunks()
        for start in range(0, len(body), 9000):
            piece = body[start : start + 9000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def answer_keep(self, body):
        """Send the file and keep the connection open."""
        self.send(body)
        self.server.over.wait(SECONDS)

    def answer_stored(self, body):
        """Send the same contents, compressed otherwise."""
        self.send(gzip.compress(gzip.decompress(body), compresslevel=0))

    def answer_recovering(self, body):
        """Fail the first request for a path, and then send the file."""
        if self.server.paths.count(self.path) == 1:
            self.send(b"later", 503)
        else:
            self.send(body)

    def answer_loop(self, body):
        """Redirect to the same address."""
        self.send(b"", 302, Location=self.path)

    def answer_file_redirect(self, body):
        """Redirect to a file of the client's machine."""
        self.send(b"", 302, Location="file:///etc/hostname")

    # --- Slow and broken connections --------------------------------------------------------------

    def answer_mute(self, body):
        """Send nothing."""
        self.server.over.wait(SECONDS)

    def answer_stall(self, body):
        """Send half of the file, and then nothing."""
        self.send(body[: len(body) // 2], length=len(body))
        self.server.over.wait(SECONDS)

    def answer_dribble(self, body):
        """Send the file byte by byte."""
        self.send(b"", length=len(body))
        for byte in body[:DRIBBLE_BYTES]:
            self.wfile.write(bytes([byte]))
            if self.server.over.wait(0.02):
                return

    def answer_truncated(self, body):
        """Send half of what the header claims."""
        self.send(body[: len(body) // 2], length=len(body))

    def answer_open(self, body):
        """Send half of the file without saying how long it is."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])

    def answer_broken_chunks(self, body):
        """Close the connection in the middle of a chunk."""
        self._start_chunks()
        self.wfile.write(b"%x\r\n%s" % (len(body), body[:100]))

    def answer_reset(self, body):
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        os.close(self.connection.detach())

    def answer_garbage(self, body):
        """Send what is not HTTP."""
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def answer_boast(self, body):
        """Announce a terabyte."""
        self.send(body, length=10**12)

    def answer_flood(self, body):
        """Send random bytes without an announced end, up to FLOOD_BYTES."""
        self.send_response(200)
        self.end_headers()
        noise = random.Random(2).randbytes(1 << 16)
        while self.server.flooded < FLOOD_BYTES and not self.server.over.is_set():
            try:
                self.wfile.write(noise)
            except OSError:  # the client has closed the connection
                return
            self.server.flooded += len(noise)

    def _start_chunks(self):
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
