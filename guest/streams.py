"""The text streams of the cells: UTF-8, written through to the descriptor at once.

Nothing may wait in a buffer of the guest: a hard stop rolls the guest's memory back, and the output would be lost.
"""

import io
import sys

_sys_names = sys.__dict__
_FileIO, _write, _memoryview, _len = io.FileIO, io.FileIO.write, memoryview, len
COPY_CHARS_MAX = 64 * 1024


class Descriptor(_FileIO):
    """The raw part: writes everything (a pipe may take less), and cannot be closed by a cell."""

    copy = None  # A list that receives the text of the current cell, in profiles which search it.
    room = 0

    def write(self, data):
        size = _write(self, data)
        view = None
        while size is None or size < _len(data):
            view = _memoryview(data).cast("B") if view is None else view
            if size == _len(view):
                break
            size = (size or 0) + (_write(self, view[size or 0 :]) or 0)
        if self.copy is not None and self.room > 0:
            piece = bytes(data[: self.room])
            self.room -= _len(piece)
            self.copy.append(piece)
        return size

    def close(self):
        # `sys.stdout.close()`, or dropping a wrapper around `sys.stdout.buffer`, must not silence later cells.
        pass


def _open(fd):
    raw = Descriptor(fd, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", newline="\n", write_through=True)


class Streams:
    """`sys.stdout`, `sys.stderr` and `sys.stdin`, put back after every cell."""

    def __init__(self):
        self.out, self.err = _open(1), _open(2)
        self.stdin = io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8")
        self.restore()
        sys.__stdout__, sys.__stderr__, sys.__stdin__ = self.out, self.err, self.stdin

    def restore(self):
        known, out, err, stdin = _sys_names.get, self.out, self.err, self.stdin
        if known("stdout") is out and known("stderr") is err and known("stdin") is stdin:
            try:
                if not (out.closed or err.closed or stdin.closed):
                    return
            except ValueError:
                pass  # Detached.
        if sys.__dict__.get("stdout") is not self.out or _broken(self.out):
            self.out = sys.stdout = sys.__stdout__ = self.out if not _broken(self.out) else _open(1)
        if sys.__dict__.get("stderr") is not self.err or _broken(self.err):
            self.err = sys.stderr = sys.__stderr__ = self.err if not _broken(self.err) else _open(2)
        if sys.__dict__.get("stdin") is not self.stdin or _broken(self.stdin):
            self.stdin = sys.stdin = self.stdin if not _broken(self.stdin) else io.TextIOWrapper(io.BytesIO(b""))

    def keep_copy(self):
        """From now on, keep the first `COPY_CHARS_MAX` bytes written to stdout."""
        raw = self.out.buffer
        raw.copy, raw.room = [], COPY_CHARS_MAX

    def take_copy(self):
        raw = self.out.buffer
        text = b"".join(raw.copy or ()).decode("utf-8", "replace")
        raw.copy, raw.room = None, 0
        return text

    def write_error(self, text):
        """To descriptor 2, wherever the cell's `sys.stderr` points."""
        try:
            _write(self.err.buffer, text.encode("utf-8", "backslashreplace"))
        except (OSError, ValueError):
            pass  # The cell closed the descriptor; the reply has the traceback too.


def _broken(stream):
    try:
        return stream.closed
    except ValueError:  # Detached.
        return True
