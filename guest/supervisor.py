"""The process between the host and the worker in which cells run, where the guest is a process.

The host speaks to it over fd 0 and 1. It forks the worker, carries frames between the two, collects what the worker's
process tree prints, counts what it computes, stops it with signals, and says how it ended. It never runs code of cells,
and the worker has neither its descriptors nor a way to speak for it: what a cell prints or writes to low descriptors is
output, whatever it looks like. Where the system allows it, the worker can't open this process in /proc either.

Frames in both directions are `kind: 1 byte | length: u32 big-endian | payload`:

    D   host    bytes for the worker
    C   host    {"op": "begin" | "end" | "interrupt" | "kill" | "start"}
    B   host    the first frame: settings, sources and compiled code, see `Boot`
    D   guest   compute of the turn in us: u64 | resident KiB: u32 | bytes of the worker
    O, E guest  what was written to stdout and stderr
    C   guest   {"event": "ready" | "limit" | "dead" | "starved" | "exposed"}
    M   guest   what `Boot` compiled, for the next session of the same Python:
                magic number | length: u32 | supervisor, marshalled | modules, marshalled

Output that was written before a frame of the worker is passed on before it.
"""

import errno
import fcntl
import json
import marshal
import os
import select
import signal
import stat
import sys
import types

CHUNK = 1 << 18
OUTPUT_ROUND = 1 << 20  # Bytes of output that are passed on before a frame gets its turn.
PENDING_MAX = 4 << 20  # Bytes for the worker; beyond them the host has to wait.
F_SETPIPE_SZ = 1031  # linux/fcntl.h; in `fcntl` since Python 3.10.
PIPE_BYTES = 1 << 20
OPEN_MODE = 0o700
MAGIC = sys.modules["_frozen_importlib_external"].MAGIC_NUMBER


def read_exactly(size):
    data = bytearray()
    while len(data) < size:
        piece = os.read(0, min(CHUNK, size - len(data)))
        if not piece:
            os._exit(0)
        data += piece
    return bytes(data)


def write_all(data):
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            select.select([], [1], [])


def frame(kind, payload):
    return kind + len(payload).to_bytes(4, "big") + payload


def event(name, **fields):
    fields["event"] = name
    return frame(b"C", json.dumps(fields).encode())


class Boot:
    """The first frame: `length: u32 | settings: JSON | bodies`, bodies in the order that the settings give."""

    def __init__(self, payload):
        end = 4 + int.from_bytes(payload[:4], "big")
        self.settings = json.loads(payload[4:end])
        self.bodies = {}
        for name, length in self.settings["bodies"]:
            self.bodies[name] = payload[end : end + length]
            end += length

    def modules(self):
        """The agent as the package `kaa_agent`. Returns the code, for the host to keep."""
        magic = self.settings.get("magic")
        known = magic is not None and bytes.fromhex(magic) == MAGIC
        codes = marshal.loads(self.bodies["code"]) if known else {}
        package = types.ModuleType("kaa_agent")
        package.__path__ = []
        package.__package__ = "kaa_agent"
        sys.modules["kaa_agent"] = package
        for name in self.settings["modules"]:
            module = package
            if name != "__init__":
                module = types.ModuleType("kaa_agent." + name)
                module.__package__ = "kaa_agent"
                sys.modules["kaa_agent." + name] = module
                setattr(package, name, module)
            module.__file__ = "<kaa>/" + name + ".py"
            if name not in codes:
                source = self.bodies[name].decode()
                codes[name] = compile(source, module.__file__, "exec", dont_inherit=True)
            exec(codes[name], module.__dict__)
        if not known:
            source = self.bodies["supervisor"].decode()
            codes["supervisor"] = compile(source, "<kaa>/supervisor.py", "exec", dont_inherit=True)
        return None if known else codes


class Supervisor:
    def __init__(self, boot):
        self.settings = boot.settings
        self.codes = boot.modules()
        import kaa_agent.processes as processes

        self.processes = processes.Processes(self.settings["is_alone"])
        self.watch = processes.Watch(self.processes)
        self.poll = select.poll()
        self.buffer, self.expected = bytearray(), 0  # An order that is not complete; bytes of a frame for the worker.
        self.pending = []  # Bytes for the worker.
        self.pending_bytes = 0
        self.is_blocked = False  # Whether the worker has to take some of them before it gets more.
        self.channel = None
        self.pipes = {}  # Descriptor to kind of frame.
        self.agent = self.carrier = None
        self.workers = 0  # There have been.
        self.turn = 0  # The host's number of the turn: what is said of one isn't to be taken for the next.

    def start(self):
        """Forks a worker. The agent is set up once, here, and every worker begins with a copy of it."""
        import kaa_agent.agent
        import kaa_agent.worker as worker
        from kaa_agent.processes import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, prctl

        if self.agent is None:
            self.carrier = worker.Carrier()
            self.agent = kaa_agent.agent.install(self.carrier.call)
            self.agent.operations.update(worker.operations(self.agent))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            is_hidden = prctl(PR_SET_DUMPABLE, 0)
            if not self.settings["is_alone"]:
                prctl(PR_SET_CHILD_SUBREAPER, 1)
            elif not is_hidden:
                # A worker of the same user could open the channel to the host in /proc.
                write_all(event("exposed"))
                os._exit(0)
        else:
            empty(self.settings["scratch"])
        self.workers += 1
        settings = dict(self.settings, worker=self.workers)
        near, far = worker.socket_pair()
        output, error = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            # Nothing of the supervisor is left in the worker but its code.
            for descriptor in (near, output[0], error[0], *wakeup):
                os.close(descriptor)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            worker.run(self.agent, self.carrier, far, output[1], error[1], settings)
        for descriptor in (far, output[1], error[1]):
            os.close(descriptor)
        self.processes.begin(pid)
        self.channel = near
        self.pipes = {output[0]: b"O", error[0]: b"E"}
        for descriptor in (near, output[0], error[0]):
            os.set_blocking(descriptor, False)
            self.poll.register(descriptor, select.POLLIN)

    def serve(self):
        for descriptor in (0, wakeup[0]):
            self.poll.register(descriptor, select.POLLIN)
        while True:
            ready = dict(self.poll.poll(self.watch.timeout()))
            if wakeup[0] in ready:
                drain(wakeup[0])
            if self.channel in ready:
                if ready[self.channel] & select.POLLOUT:
                    self.send()
                if ready[self.channel] & ~select.POLLOUT:
                    self.receive()
            elif any(pipe in ready for pipe in self.pipes):
                write_all(b"".join(self.output()))
            if self.processes.worker is not None and self.processes.reap():
                self.bury()
            if 0 in ready:
                self.listen()
            self.check()

    def output(self):
        """What was printed, as frames."""
        found, size = [], 0
        for pipe, kind in self.pipes.items():
            while size < OUTPUT_ROUND:
                piece = read_some(pipe)
                if not piece:
                    if piece is not None:
                        self.forget(pipe)  # Nobody has its other end any more.
                    break
                found.append(frame(kind, piece))
                size += len(piece)
        return found

    def forget(self, descriptor):
        try:
            self.poll.unregister(descriptor)
        except KeyError:
            pass  # It was forgotten before.

    def receive(self):
        """Passes on what the worker says, after what was printed before it."""
        piece = read_some(self.channel)
        if piece is None:
            return
        found = self.output()
        if not piece:
            # The worker closed its end, which it never does by itself, or has just ended.
            write_all(b"".join(found))
            self.processes.reap()
            return self.bury()
        head = int(self.watch.spent() * 1e6).to_bytes(8, "big") + self.processes.resident_kib().to_bytes(4, "big")
        if self.watch.is_long() and self.processes.was_starved():
            found.append(event("starved"))
        found.append(frame(b"D", head + piece))
        write_all(b"".join(found))

    def send(self):
        """Gives the worker what it takes."""
        while self.pending:
            try:
                written = os.write(self.channel, self.pending[0])
            except BlockingIOError:
                break
            except OSError:
                self.pending, self.pending_bytes = [], 0
                break
            self.pending_bytes -= written
            if written == len(self.pending[0]):
                del self.pending[0]
            else:
                self.pending[0] = memoryview(self.pending[0])[written:]
        if bool(self.pending) != self.is_blocked:
            self.is_blocked = bool(self.pending)
            self.poll.modify(self.channel, select.POLLIN | (select.POLLOUT if self.is_blocked else 0))
            self.poll.modify(0, select.POLLIN if self.pending_bytes < PENDING_MAX else 0)
        elif self.is_blocked:
            self.poll.modify(0, select.POLLIN if self.pending_bytes < PENDING_MAX else 0)

    def listen(self):
        """Frames of the host."""
        piece = read_some(0)
        if piece is None:
            return
        if not piece:
            self.leave()
        piece = memoryview(piece)
        while piece:
            if self.expected:
                # Bytes of the worker need not be complete to be passed on.
                self.forward(piece[: self.expected])
                piece, self.expected = piece[self.expected :], max(0, self.expected - len(piece))
                continue
            wanted = 5 if len(self.buffer) < 5 else 5 + int.from_bytes(self.buffer[1:5], "big")
            taken = wanted - len(self.buffer)
            self.buffer += piece[:taken]
            piece = piece[taken:]
            if len(self.buffer) == 5 and self.buffer[:1] == b"D":
                self.expected = int.from_bytes(self.buffer[1:5], "big")
                self.buffer.clear()
            elif len(self.buffer) > 5 and len(self.buffer) == wanted:
                order = json.loads(bytes(self.buffer[5:]))
                self.buffer.clear()
                self.obey(order)
        if self.pending:
            self.send()

    def forward(self, piece):
        if self.channel is not None:
            self.pending.append(piece)
            self.pending_bytes += len(piece)

    def obey(self, order):
        operation = order["op"]
        if operation == "begin":
            self.turn = order["turn"]
            self.watch.begin(order["compute"], order["grace"])
        elif operation == "end":
            self.watch.end()
        elif operation == "interrupt":
            if self.pending:
                self.send()
            self.processes.signal(signal.SIGINT)
            self.watch.stopped()
        elif operation == "kill":
            self.bury()
        elif operation == "start" and self.processes.worker is None:
            self.start()
            write_all(event("ready", worker=self.workers))

    def check(self):
        """The limit on what the turn computes."""
        due = self.watch.check()
        if due == "soft":
            write_all(event("limit", turn=self.turn, hard=False))
            self.processes.signal(signal.SIGINT)
            self.watch.stopped()
        elif due == "hard":
            # The host may have heard of the cell's end already: it decides, if it does so soon.
            write_all(event("limit", turn=self.turn, hard=True))
        elif due == "overdue":
            self.bury()

    def bury(self):
        """Ends what is left of the worker's tree, and says how the worker ended."""
        if self.channel is None:
            return
        by_itself = self.processes.worker is None
        resident = self.processes.resident_kib()
        spent = self.watch.spent()
        self.processes.kill()
        write_all(b"".join(self.output()))
        for descriptor in (self.channel, *self.pipes):
            self.forget(descriptor)
            os.close(descriptor)
        self.channel, self.pipes, self.pending, self.pending_bytes = None, {}, [], 0
        self.is_blocked = False
        self.poll.modify(0, select.POLLIN)
        self.watch.end()
        status = self.processes.exit if self.processes.exit is not None else 0
        code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        starved = self.processes.was_starved()
        write_all(
            event(
                "dead",
                killed=not by_itself,
                code=code,
                signal=number,
                starved=starved,
                compute_us=int(spent * 1e6),
                resident_kib=resident,
            )
        )
        self.processes.forget_worker()

    def leave(self):
        """The host is gone."""
        self.processes.kill()
        if not self.settings["is_alone"]:
            # It may be gone for good, and nobody else would do it.
            empty(self.settings["scratch"])
            try:
                os.rmdir(self.settings["scratch"])
            except OSError:
                pass
        os._exit(0)


def read_some(descriptor):
    """A piece; None: there is nothing now."""
    try:
        return os.read(descriptor, CHUNK)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in (errno.EIO, errno.ECONNRESET):
            return b""
        raise


def empty(folder):
    """Removes what is in a directory, however deep, but for what is mounted there. Best effort."""
    try:
        device = os.lstat(folder).st_dev
    except OSError:
        return
    kept, done, before = mounted(folder), 0, -1
    while done > before:
        before = done
        for path in inside(folder, device):
            if path in kept:
                continue
            if remove(path):
                done += 1
                continue
            # Its directories come up to here, so that no path gets too long.
            for inner in inside(path, device):
                try:
                    if not remove(inner):
                        os.rename(inner, "%s/.kaa-%d" % (folder, done))
                        done += 1
                except OSError:
                    pass
            done += remove(path)


def mounted(folder):
    """What in a directory leads to something that is mounted: it has to stay where it is."""
    try:
        with open("/proc/self/mounts", "rb") as file:
            points = [os.fsdecode(line.split()[1]) for line in file]
    except (OSError, IndexError):
        return set()
    depth = folder.count("/") + 2
    return {"/".join(point.split("/")[:depth]) for point in points if point.startswith(folder + "/")}


def inside(folder, device):
    """What lies in a directory, and in this file system."""
    try:
        if not is_directory(folder):
            return []
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            os.chmod(folder, OPEN_MODE)
        found = ["%s/%s" % (folder, name) for name in os.listdir(folder)]
        return [path for path in found if os.lstat(path).st_dev == device]
    except OSError:
        return []


def is_directory(path):
    return stat.S_ISDIR(os.lstat(path).st_mode)


def remove(path):
    """Whether there was a file, or an empty directory, to remove."""
    try:
        if is_directory(path):
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        return False
    return True


def drain(descriptor):
    while read_some(descriptor):
        pass


def make_scratch(settings):
    """The session's directory, where the host could not make it: its worker's, and nobody else's."""
    if not is_demoted(settings):
        settings["user"] = None
    try:
        os.mkdir(settings["scratch"], OPEN_MODE)
    except FileExistsError:
        return
    if settings["user"] is not None:
        os.chown(settings["scratch"], settings["user"], settings["user"])


def is_demoted(settings):
    """Whether the worker becomes another user than this process is: one who can read this Python's own files."""
    if settings["user"] is None or os.geteuid() != 0:
        return False
    path = os.path.dirname(os.path.realpath(os.__file__))
    while os.stat(path).st_mode & stat.S_IXOTH:
        if path == "/":
            return True
        path = os.path.dirname(path)
    return False


def has_dill():
    import importlib.util

    return importlib.util.find_spec("dill") is not None


wakeup = ()


def main():
    global wakeup
    kind = read_exactly(1)
    boot = Boot(read_exactly(int.from_bytes(read_exactly(4), "big")))
    assert kind == b"B"
    make_scratch(boot.settings)
    if not boot.settings["is_alone"]:
        try:
            os.setsid()  # Ctrl-C in the terminal is the host's affair.
        except OSError:
            pass
    wakeup = os.pipe()
    for descriptor in wakeup:
        os.set_blocking(descriptor, False)
    supervisor = Supervisor(boot)
    signal.set_wakeup_fd(wakeup[1], warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for descriptor in (0, 1):
        try:
            fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # No pipe, or another system.
    try:
        supervisor.start()
        if supervisor.codes is not None:
            own = marshal.dumps(supervisor.codes.pop("supervisor"))
            code = MAGIC + len(own).to_bytes(4, "big") + own + marshal.dumps(supervisor.codes)
            write_all(frame(b"M", code))
        write_all(event("ready", worker=supervisor.workers, python=sys.version.split()[0], dill=has_dill()))
        supervisor.serve()
    except BrokenPipeError:
        supervisor.leave()
