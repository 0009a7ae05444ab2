"""The first words to a guest that is a process: reads the supervisor from stdin and becomes it.

Before the first frame lie three parts, each with its length before it (u32 big-endian): the magic number of the Python
that compiled the supervisor, or nothing; the compiled supervisor, or nothing; its source. It has to be understood by
Pythons that are too old for the rest, so that they can be told.
"""

import marshal
import os
import struct
import sys


def read(size):
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            os._exit(0)  # The host is gone.
        data += piece
    return data


def read_part():
    return read(int.from_bytes(read(4), "big"))


if sys.version_info < (3, 9):
    event = b'{"event":"unfit","python":"%d.%d"}' % sys.version_info[:2]
    os.write(1, b"C" + struct.pack(">I", len(event)) + event)
    os._exit(0)
magic, code, source = read_part(), read_part(), read_part()
if magic == sys.modules["_frozen_importlib_external"].MAGIC_NUMBER:
    code = marshal.loads(code)
else:
    code = compile(source, "<kaa>/supervisor.py", "exec")
supervisor = {"__name__": "kaa_supervisor"}
exec(code, supervisor)
supervisor["main"]()
