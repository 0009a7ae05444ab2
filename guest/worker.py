"""The process in which cells run, where the guest is a process: its carrier, its descriptors, its end.

Frames between worker and host are `length: u32 big-endian | call: u32 | message`. The worker numbers its calls, and the
host's answer has the call's number: threads may ask at the same time. Whoever waits first reads for all.
"""

import fcntl
import os
import signal
import threading

from . import saving

READ_BYTES = 1 << 16
LONG_BYTES = 1 << 20  # More than can lie in a buffer behind another answer.
CHANNEL_BYTES = 1 << 20
DESCRIPTOR_MIN = 256  # What cells open, and what they guess, lies below.
_read, _readv, _writev, _getpid, _allocate = os.read, os.readv, os.writev, os.getpid, threading.Lock
_len, _int, _view, _ident, _exit = len, int, memoryview, threading.get_ident, os._exit


class Carrier:
    """Carries calls of the agent and of the cells' threads to the host."""

    def __init__(self):
        self.channel = self.pid = self.main = None
        self.buffer, self.number = bytearray(), 0
        self.long = None  # A long answer: its number, its bytes, and how many of them are there.
        self.sending, self.state = _allocate(), _allocate()
        self.reading = False
        self.open, self.answers, self.waiting = set(), {}, {}

    def bind(self, channel):
        self.channel, self.pid, self.main = channel, _getpid(), _ident()

    def is_elsewhere(self):
        """Whether this isn't the thread of the cells, which soft stops are for."""
        return _ident() != self.main

    def orphan(self):
        """In a forked child of the worker: it has nothing to say to the host."""
        if self.channel is not None:
            os.close(self.channel)
        self.channel = None

    def call(self, frame):
        if self.channel is None or _getpid() != self.pid:
            raise OSError("a process that a cell started cannot call the host")
        try:
            with self.sending:
                number = self.number = (self.number + 1) & 0xFFFFFFFF
                self.open.add(number)
                self.send(_len(frame).to_bytes(4, "big") + number.to_bytes(4, "big"), frame)
            return self.receive(number)
        except OSError:
            _exit(1)  # A cell closed the channel: nobody can be told anything any more.
        finally:
            self.open.discard(number)

    def send(self, head, frame):
        if _len(frame) < 4096:
            parts = [head + frame]
        else:
            parts = [head, frame]
        while parts:
            written = _writev(self.channel, parts)
            while parts and written >= _len(parts[0]):
                written -= _len(parts.pop(0))
            if written:
                parts[0] = _view(parts[0])[written:]

    def receive(self, number):
        """Waits for an answer: by reading, or until the thread that reads has it."""
        gate = None
        with self.state:
            if number in self.answers:
                return self.answers.pop(number)
            if self.reading:
                gate = self.waiting[number] = _allocate()
                gate.acquire()
            self.reading = True
        if gate is not None:
            gate.acquire()
            with self.state:
                self.waiting.pop(number, None)
                if number in self.answers:
                    return self.answers.pop(number)
            # Otherwise the thread that read is done, and it's this one's turn.
        try:
            while True:
                answered, message = self.read()
                if answered == number:
                    return message
                with self.state:
                    if answered in self.open:
                        self.answers[answered] = message
                        if answered in self.waiting:
                            self.waiting[answered].release()
        finally:
            with self.state:
                heirs = [gate for waits, gate in self.waiting.items() if waits not in self.answers]
                if heirs:
                    heirs[0].release()
                else:
                    self.reading = False

    def read(self):
        """The next answer and its number. What has come of an answer stays if a signal's handler raises."""
        if self.long is None:
            buffer = self.buffer
            while _len(buffer) < 8:
                self.fill()
            length, number = _int.from_bytes(buffer[:4], "big"), _int.from_bytes(buffer[4:8], "big")
            if length < LONG_BYTES:
                while _len(buffer) < 8 + length:
                    self.fill()
                message = bytes(_view(buffer)[8 : 8 + length])
                del buffer[: 8 + length]
                return number, message
            message = bytearray(length)
            had = _len(buffer) - 8
            message[:had] = buffer[8:]
            buffer.clear()
            self.long = [number, message, had]
        long = self.long
        number, message, had = long
        with _view(message) as view:
            while long[2] < _len(message):
                read = _readv(self.channel, [view[long[2] :]])
                if not read:
                    _exit(0)
                long[2] += read
        self.long = None
        return number, message

    def fill(self):
        piece = _read(self.channel, READ_BYTES)
        if not piece:
            _exit(0)  # Without a supervisor there is nobody to work for.
        self.buffer += piece


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
        status = os.fstat(descriptor)
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


def run(agent, carrier, channel, output, error, settings):
    """The life of a worker. Never returns."""
    try:
        os.setsid()
        kept = keep(channel)
        os.close(channel)
        os.close(0)
        os.close(1)
        os.close(2)
        descriptors = Descriptors(keep(output), keep(error))
        for descriptor in (output, error):
            if descriptor > 2:
                os.close(descriptor)
        carrier.bind(kept)
        os.register_at_fork(after_in_child=carrier.orphan)
        agent.channel.is_elsewhere = carrier.is_elsewhere
        bound(settings)
        os.chdir(settings["scratch"])
        agent.repairs.descriptors = descriptors
        agent.repairs.restore()
        signal.set_wakeup_fd(-1)
        while carrier.channel is not None:
            agent.turn()
    finally:
        os._exit(0)


def operations(agent):
    """What the host may ask of an agent in a process, beside what it may ask of any."""
    return {"save": saving.make_save(agent), "load": saving.make_load(agent)}
