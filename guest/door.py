"""Calls of language models over HTTP to the broker (`guest/broker/`), where that is their way.

Each call has a connection of its own, so that threads don't wait for each other, and what the handler of a signal raises
here, between any two steps, leaves nothing behind: the connection is closed, and the broker drops the call. A call has an
id, by which it is the same one when it's sent again: a connection that broke, or a descriptor that a cell closed, costs
nothing. Everything used is bound when the module is imported, before the first cell.
"""

import _socket
import binascii
import errno
import os
import time

from .values import loads

TRIES = 40  # In a row without an answer: about ten seconds.
FULL = 503
PAUSE = 0.05
PAUSE_MAX = 0.25  # A cell that has to stop doesn't before the end of one.
READ_BYTES = 1 << 18
HEAD_BYTES_MAX = 1 << 16
# The host's limit of the cell is shorter, and ends the call.
TIMEOUT_SECONDS = 24 * 60 * 60
_Socket, _sleep, _urandom, _close, _len, _min, _int = _socket.socket, time.sleep, os.urandom, os.close, len, min, int
_encode, _decode, _isinstance = binascii.b2a_base64, binascii.a2b_base64, isinstance
_FAMILY, _KIND = _socket.AF_INET, _socket.SOCK_STREAM
_NODELAY = _socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1


class Door:
    """The way to the broker."""

    def __init__(self, settings, worker, keep):
        self.address, self.bytes_max = ("127.0.0.1", settings["port"]), settings["bytes_max"]
        self.worker = worker  # Its number.
        self.keep = keep  # Moves a descriptor to where cells don't come by.
        self.head = (
            "POST /enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n"
            "Content-Type: application/json\r\nConnection: close\r\nContent-Length: " % settings["token"]
        ).encode()

    def call(self, frame):
        """One call, and the host's answer to it."""
        start = b'{"type":"frame","worker":%d,"timeout":%d,"id":"%s","frame":"' % (
            self.worker,
            TIMEOUT_SECONDS,
            _urandom(16).hex().encode(),
        )
        body = b"".join((start, _encode(frame, newline=False), b'"}'))
        head = b"%s%d\r\n\r\n" % (self.head, _len(body))
        failed, pause = 0, PAUSE
        while True:
            try:
                status, answer = self.exchange(head, body)
                if status != FULL:
                    return self.open(status, answer)
                failed = 0  # It's there, and has more calls than it takes: this one waits for its turn.
            except OSError as error:
                if error.errno is None:
                    raise  # Of the handler of a signal: an alarm's TimeoutError is an OSError, too.
                failed += 1
                if failed == TRIES:
                    raise OSError("the broker of the session cannot be reached: %s" % error) from None
            pause = _min(pause * 2, PAUSE_MAX)
            _sleep(pause)

    def exchange(self, head, body):
        """One request and its response: the status and the body."""
        low = _Socket(_FAMILY, _KIND).detach()
        try:
            socket = _Socket(_FAMILY, _KIND, 0, self.keep(low))
        finally:
            _close(low)
        try:
            socket.settimeout(None)  # Cells can set a default.
            socket.setsockopt(*_NODELAY)
            socket.connect(self.address)
            socket.sendall(head)
            socket.sendall(body)
            return self.read(socket)
        finally:
            socket.close()

    def read(self, socket):
        data, end = bytearray(), -1
        while end < 0:
            self.fill(socket, data, READ_BYTES)
            end = data.find(b"\r\n\r\n")
            if _len(data) > HEAD_BYTES_MAX and end < 0:
                raise OSError(errno.EPROTO, "a response without an end of its head")
        lines = bytes(data[:end]).lower().split(b"\r\n")
        del data[: end + 4]
        lengths = [line[15:] for line in lines[1:] if line.startswith(b"content-length:")]
        try:
            status, length = _int(lines[0].split(b" ")[1]), _int(lengths[0])
        except (IndexError, ValueError):
            raise OSError(errno.EPROTO, "a response that is not HTTP/1.1") from None
        try:
            while _len(data) < length:
                self.fill(socket, data, _min(READ_BYTES, length - _len(data)))
            return status, data.decode()
        except MemoryError:
            raise MemoryError("the host's answer is too long for the memory") from None

    def fill(self, socket, data, size):
        piece = socket.recv(size)
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "the broker closed the connection")
        data += piece

    def open(self, status, answer):
        try:
            answer = loads(answer)
        except ValueError:
            answer = None
        if not _isinstance(answer, dict):
            raise RuntimeError("the broker answered with something else, status %d" % status)
        frame = answer.get("frame")
        if status != 200 or not _isinstance(frame, str):
            raise RuntimeError("the broker refused the call: %s" % (answer.get("error") or status))
        return _decode(frame)
