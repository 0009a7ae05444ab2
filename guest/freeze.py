"""What is done to the heap before an image is saved, so that a session writes to few of its pages.

A page that a session writes is copied for it. Three things write all over a heap that nobody changes:

- counts of references. What the image holds becomes immortal: CPython leaves the counts of such objects alone, and
  nothing of the image is ever freed.
- counters in code that runs. The functions that sessions run get their code side by side.
- small objects that are put into the holes between others. The holes are filled.
"""

import gc
import opcode
import sys
import types

BATCH = 2048
HOLE_MAX = 1 << 18
HOLES_MAX = 1 << 16
CHUNK, CHUNK_HEAD = 16, 4  # The grain of the guest's `malloc`, and what it keeps of each.
_is_immortal = getattr(sys, "_is_immortal", None)  # Since CPython 3.14.
_is_tracked, _referents, _keys = gc.is_tracked, gc.get_referents, dict.keys
_RUN = getattr(opcode, "_specialized_opmap", {}).get("RESUME_CHECK")  # What the first instruction becomes.
_ID_BYTES = 4 if sys.maxsize < 2**32 else 8


def gather(settled):
    """Gives every function that has run new code, side by side with that of the others, which has not run.

    Code in `settled`, a dict by identity, stays where it is. Returns the new code as another such dict.
    """
    copies, new = {}, {}
    for value in gc.get_objects():
        if type(value) is types.FunctionType and _has_run(value.__code__) and id(value.__code__) not in settled:
            code = value.__code__
            if id(code) not in copies:
                copy = _copy(code)
                copies[id(code)], new[id(copy)] = (code, copy), copy
            value.__code__ = copies[id(code)][1]
    return new


def _has_run(code):
    return _RUN is not None and not _is_immortal(code) and _RUN in code._co_code_adaptive[::2]


def _copy(code):
    consts = [_copy(value) if type(value) is types.CodeType else value for value in code.co_consts]
    return code.replace(co_consts=tuple(consts))


class Survey:
    """Finds every object, a batch at a time: the host makes one batch immortal before it asks for the next.

    Batches are held until then, so that no address is one of freed memory. What is immortal has been seen.
    """

    def __init__(self):
        self.batch = []
        self.open = [] if _is_immortal is None else gc.get_objects()

    def next(self):
        """The addresses of the next batch, none at the end."""
        found = [*self.batch]
        for value in self.batch:
            kind = type(value)
            if kind is types.CodeType:
                found += (value.co_consts, value.co_names, value.co_filename, value.co_name, value.co_qualname)
                found += (value.co_linetable, value.co_exceptiontable)
            elif issubclass(kind, dict):
                found += _keys(value)  # The collector leaves them out: no key that is a str is part of a cycle.
        # What is tracked was there from the start; if it was not, it belongs to the survey.
        inner = {id(value): value for value in _referents(*found) if not _is_tracked(value)}
        inner.update((id(value), value) for value in found if not _is_tracked(value))
        self.open += [value for value in inner.values() if not _is_immortal(value)]
        found = inner = value = None
        self.batch = []
        while self.open and not self.batch:
            self.batch = [value for value in self.open[-BATCH:] if _fits(value)]
            del self.open[-BATCH:]
        return b"".join([id(value).to_bytes(_ID_BYTES, "little") for value in self.batch])


def _fits(value):
    return not _is_immortal(value) and type(value) is not types.FrameType


def fill_holes():
    """Takes all free memory that lies in pieces, so that the next objects lie side by side; returns what must be kept.

    `malloc` takes the smallest piece that is large enough. What it gives for `HOLE_MAX` is the front of the piece that
    is to be used next; a smaller request which ends up there found no other. Only the guest's own `malloc` is like that.
    """
    if sys.platform != "wasi":
        return []
    kept, count, front = [None] * HOLES_MAX, 0, id(bytes(HOLE_MAX))
    size = HOLE_MAX
    while size >= CHUNK and count < HOLES_MAX:
        value = object() if size == CHUNK else bytes(size - CHUNK_HEAD - bytes.__basicsize__)
        if front <= id(value) < front + HOLE_MAX:
            size -= max(CHUNK, size // 8 // CHUNK * CHUNK)
            continue
        kept[count] = value
        count += 1
    value = None
    del kept[count:]
    return kept
