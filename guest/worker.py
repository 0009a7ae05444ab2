"""The process in which cells run, where the guest is a process: its carrier, its descriptors, its end.

Frames to the host are `length: u32 big-endian | call: u32 | token: 8 bytes | message`, frames from there the same without
the token. The worker numbers its calls, and the host's answer has the call's number: threads may ask at the same time.
Whoever waits first reads for all. The token is the session's: bytes that a cell writes to descriptors it guessed have none.
"""

import collections
import errno
import fcntl
import itertools
import os
import signal
import threading

from . import saving
from .door import Door
from .processes import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl
from .values import TEXT, pack, unpack

READ_BYTES = 1 << 16
LONG_BYTES = 1 << 20  # More than can lie in a buffer behind another answer.
CHANNEL_BYTES = 1 << 20
DESCRIPTOR_MIN = 256  # What cells open, and what they guess, lies below.
_GONE = frozenset((errno.EBADF, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN))
_TAGS = frozenset((b"L", b"R"))  # Of calls of language models that are one text; the others have this header.
_LM = pack({"op": "lm"})[4:-1]
_WHY = pack({"op": "why"})
_STOPPED = {"error": "stopped"}
_NEXT = pack({"op": "next"})
_FULL = pack({"op": "done", "error": "MemoryError: the memory is full"})  # There may be no room to write it then.
_FAILED = pack({"op": "done", "error": "the agent: the handler of a signal raised in it"})
_read, _readv, _writev, _getpid, _allocate = os.read, os.readv, os.writev, os.getpid, threading.Lock
_len, _int, _view, _ident, _exit, _map, _sum = len, int, memoryview, threading.get_ident, os._exit, map, sum
_fstat, _isinstance = os.fstat, isinstance
_note = collections.deque(maxlen=0).extend  # Runs an iterator to its end.


class Carrier:
    """Carries calls of the agent and of the cells' threads to the host.

    The handler of a signal, which a cell may set, runs between any two steps of Python, and what it raises (an alarm's
    `TimeoutError`, for one) comes out of there. So a system call and the note of what it did are one step here, by
    `map`; what is taken away is taken away last; and half a frame is never left behind. Loops are functions of
    their own: in some CPythons a loop's jump back is outside of the `try` around it.
    """

    def __init__(self):
        self.channel = self.known = self.pid = self.main = self.token = None
        self.bytes_max = 0  # Of a frame.
        self.numbers = itertools.count(1)
        self.buffer = bytearray()
        self.long = None  # A long answer: its number, its length, its bytes, and how many came with each read.
        # A thread that didn't let go, as `with` may be interrupted before 3.11, can go on.
        self.sending, self.state = threading.RLock(), threading.RLock()
        self.reader = None  # The call whose thread reads.
        self.door = None  # The way of calls of language models, if they have one of their own.
        self.open, self.answers, self.waiting = set(), {}, {}

    def bind(self, channel, bytes_max, token, door):
        self.door = door
        self.channel, self.known, self.bytes_max, self.token = channel, identity(channel), bytes_max, token
        self.pid, self.main = _getpid(), _ident()

    def is_elsewhere(self):
        """Whether this isn't the thread of the cells, which soft stops are for."""
        return _ident() != self.main

    def orphan(self):
        """In a forked child of the worker: it has nothing to say to the host."""
        if self.channel is not None:
            os.close(self.channel)
        self.channel = None

    def is_orphan(self):
        return self.channel is None or _getpid() != self.pid

    def call(self, frame):
        """Asks the host for a cell, in any of its threads."""
        if self.is_orphan():
            raise OSError("a process that a cell started cannot call the host")
        if self.door is None or not is_for_models(frame) or _len(frame) > self.door.bytes_max:
            return self.ask(frame)
        answer = self.door.call(frame)
        if answer[:1] != TEXT and unpack(answer)[0] == _STOPPED and not self.is_elsewhere():
            # The order to stop came by the other way. What is answered there came after it.
            self.ask(_WHY)
        return answer

    def ask(self, frame):
        if _len(frame) > self.bytes_max:
            raise ValueError("a message of %d bytes: the host takes %d" % (_len(frame), self.bytes_max))
        number, written = next(self.numbers) & 0xFFFFFFFF, []
        self.open.add(number)
        try:
            self.send(number, frame, written)
            self.wait(number)
            answer = self.answers[number]
        except OSError as error:
            self.check(error)
            raise
        finally:
            self.forget(number)
        if answer is None:
            raise MemoryError("the host's answer is too long for the memory")
        return answer

    def next_request(self, frame):
        """Replies to the last request of the host, and waits for the next one; None: there was no room for it.

        What is raised meanwhile belongs to no cell: it's what an alarm does that a cell didn't turn off.
        """
        number, written = next(self.numbers) & 0xFFFFFFFF, []
        while True:
            try:
                if self.is_orphan():
                    _exit(0)
                self.open.add(number)
                self.send(number, frame, written)
                self.wait(number)
                request = self.answers[number]
                break
            except BaseException as error:
                self.check(error)
        try:
            self.forget(number)
        except BaseException:
            pass  # The request is what counts.
        return request

    def check(self, error):
        """Nobody can be told anything any more when a cell closed the channel: the end."""
        if _isinstance(error, OSError) and (error.errno in _GONE or identity(self.channel) != self.known):
            _exit(1)

    def forget(self, number):
        with self.state:
            self.open.discard(number)
            self.answers.pop(number, None)

    def send(self, number, frame, written):
        """Sends what `written` doesn't count of a frame. Once it has begun, what is raised comes after its end."""
        head = _len(frame).to_bytes(4, "big") + number.to_bytes(4, "big") + self.token
        with self.sending:
            raised = self.persist(head, frame, written)
        if raised is not None:
            raise raised

    def persist(self, head, frame, written):
        raised = None
        while True:
            try:
                self.write(head, frame, written)
                return raised
            except BaseException as error:
                self.check(error)
                if not written:
                    raise
                raised = error

    def write(self, head, frame, written):
        size = _len(head) + _len(frame)
        while (at := _sum(written)) < size:
            parts = [head[at:], frame] if at < _len(head) else [_view(frame)[at - _len(head) :]]
            written.extend(_map(_writev, (self.channel,), (parts,)))

    def wait(self, number):
        """Waits until there is an answer: by reading, or until the thread that reads has it."""
        gate = None
        try:
            with self.state:
                if number in self.answers:
                    return
                if self.reader is None:
                    self.reader = number
                else:
                    gate = _allocate()
                    gate.acquire()
                    self.waiting[number] = gate
            if gate is not None:
                gate.acquire()
            # Without an answer it's now this thread's turn to read.
            self.read_until(number)
        finally:
            try:
                self.leave(number)
            except BaseException:
                self.leave(number)
                raise

    def read_until(self, number):
        while number not in self.answers:
            self.read()

    def leave(self, number):
        raised = None
        while self.reader == number or number in self.waiting:
            try:
                self.hand_over(number)
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised

    def hand_over(self, number):
        """This thread doesn't wait any more; if it has read, another one does that now."""
        with self.state:
            self.waiting.pop(number, None)
            if self.reader != number:
                return
            for heir, gate in self.waiting.items():
                if heir not in self.answers:
                    if gate.locked():
                        gate.release()
                    self.reader = heir
                    return
            self.reader = None

    def read(self):
        """Reads until an answer is whole, or what was missing of one."""
        if self.long is None:
            buffer = self.buffer
            while _len(buffer) < 8:
                self.fill()
            length, number = _int.from_bytes(buffer[:4], "big"), _int.from_bytes(buffer[4:8], "big")
            if length < LONG_BYTES:
                while _len(buffer) < 8 + length:
                    self.fill()
                try:
                    message = bytes(_view(buffer)[8 : 8 + length])
                except MemoryError:
                    message = None
                self.deliver(number, message)
                del buffer[: 8 + length]
                return
            try:
                message = bytearray(length)
                message[: _len(buffer) - 8] = buffer[8:]
            except MemoryError:
                message = None  # It has to be read all the same.
            self.long = number, length, message, [_len(buffer) - 8]
        number, length, message, counts = self.long
        self.buffer.clear()
        while (at := _sum(counts)) < length:
            rest = bytearray(min(READ_BYTES, length - at)) if message is None else _view(message)[at:]
            counts.extend(_map(_readv, (self.channel,), ([rest],)))
            if not counts[-1]:
                _exit(0)
        self.deliver(number, message)
        self.long = None

    def fill(self):
        before = _len(self.buffer)
        _note(_map(self.buffer.__iadd__, _map(_read, (self.channel,), (READ_BYTES,))))
        if _len(self.buffer) == before:
            _exit(0)  # Without a supervisor there is nobody to work for.

    def deliver(self, number, message):
        """Gives an answer to the call that waits for it, if it still does; again, if that was interrupted."""
        with self.state:
            if number in self.open:
                self.answers[number] = message
                gate = self.waiting.get(number)
                if gate is not None and gate.locked():
                    gate.release()


def is_for_models(frame):
    return frame[:1] in _TAGS or frame[4 : 4 + _len(_LM)] == _LM


class Descriptors:
    """Descriptors 0, 1 and 2 of the worker, put back when a cell closed or replaced them."""

    def __init__(self, output, error):
        null = os.open(os.devnull, os.O_RDWR)
        # `os.dup2` would clear the flag only on the copy.
        self.spare = [keep(null), keep(output), keep(error)]
        for descriptor in (null, output, error):
            os.close(descriptor)
        for descriptor, spare in enumerate(self.spare):
            os.dup2(spare, descriptor)
        self.known = [identity(spare) for spare in self.spare]

    def restore(self):
        for descriptor, known in enumerate(self.known):
            if identity(descriptor) != known:
                try:
                    os.dup2(self.spare[descriptor], descriptor)
                except OSError:
                    pass  # The cell closed the spare one, too.


def identity(descriptor):
    try:
        status = _fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def keep(descriptor):
    """A copy of a descriptor at a place where no cell comes by, and which a program that it starts doesn't have."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, DESCRIPTOR_MIN)
    except OSError:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)  # Few are allowed here.


def socket_pair():
    """Two descriptors, for supervisor and worker."""
    import _socket  # `socket` takes milliseconds to import.

    pair = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    for end in pair:
        for option in (_socket.SO_SNDBUF, _socket.SO_RCVBUF):
            end.setsockopt(_socket.SOL_SOCKET, option, CHANNEL_BYTES)
    return tuple(end.detach() for end in pair)


def bound(settings):
    """Limits that the system holds. None of them can be raised again."""
    import resource

    wanted = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, settings["data_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
    ]
    for kind, value in wanted:
        if value is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            pass  # What the system doesn't have it can't hold; a container has a limit of its own.
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # Rather this one than the supervisor, which has to tell.
    except OSError:
        pass


def demote(user):
    """Makes this process another user's, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def run(agent, carrier, channel, output, error, settings):
    """The life of a worker. Never returns."""
    try:
        os.setsid()
        if settings["user"] is not None:
            demote(settings["user"])
        # After that: a process that becomes another user's forgets both.
        prctl(PR_SET_DUMPABLE, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        kept = keep(channel)
        os.close(channel)
        os.close(0)
        os.close(1)
        os.close(2)
        descriptors = Descriptors(keep(output), keep(error))
        for descriptor in (output, error):
            if descriptor > 2:
                os.close(descriptor)
        door = None if settings["door"] is None else Door(settings["door"], settings["worker"], keep)
        carrier.bind(kept, settings["call_bytes_max"], bytes.fromhex(settings["token"]), door)
        os.register_at_fork(after_in_child=carrier.orphan)
        agent.channel.is_elsewhere = carrier.is_elsewhere
        bound(settings)
        os.chdir(settings["scratch"])
        agent.repairs.descriptors = descriptors
        agent.repairs.restore()
        signal.set_wakeup_fd(-1)
        serve(agent, carrier)
    finally:
        os._exit(0)


def serve(agent, carrier):
    """Serves the host's requests. What the last reply of a turn is answered with is the first request of the next."""
    reply = _NEXT
    while True:
        request = carrier.next_request(reply)
        try:
            reply = _FULL if request is None else agent.handle(request)
        except BaseException:
            reply = _FAILED  # The handler of a signal raised once more, while that was being reported.
        if _len(reply) > carrier.bytes_max:
            text = "the reply: it has %d bytes, and the host takes %d" % (_len(reply), carrier.bytes_max)
            reply = pack({"op": "done", "error": text})


def operations(agent):
    """What the host may ask of an agent in a process, beside what it may ask of any."""
    return {"save": saving.make_save(agent), "load": saving.make_load(agent)}
