"""The worker's process tree, as its supervisor sees it: what it computes, what it takes, and its end."""

import os
import signal
import time

TICK_MIN, TICK_MAX = 0.005, 0.1
KILL_SECONDS = 5
LONG_SECONDS = 0.01
START_SECONDS = 10.0  # What nothing computes until a supervisor begins.
HOST_SECONDS = 1.0  # How long the host may take to decide about a worker that doesn't stop.
CLOCK_OF_PROCESS = 2  # CPUCLOCK_SCHED in Linux's include/linux/posix-timers.h.
PAGE_KIB = os.sysconf("SC_PAGESIZE") // 1024
# Where a container sees what it computes, and what its memory limit did: cgroup 2, and 1.
CPU_FILES = ("/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpuacct/cpuacct.usage")
OOM_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36  # linux/prctl.h


def prctl(option, value):
    """Best effort: other systems, and Pythons without ctypes, don't have it."""
    try:
        import ctypes

        return ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0
    except Exception:
        return False


class Processes:
    """The worker's process tree: what it computes, and its end."""

    def __init__(self, is_alone):
        self.is_alone = is_alone
        self.worker = None
        self.ended = 0.0  # Seconds of processes that are gone.
        self.exit = None
        self.known = {}  # Seconds of the worker's tree but for its own, by pid.
        self.looked = 0.0  # When they were counted.
        self.sizes = None  # Descriptor of the worker's figures of memory.
        self.families = []  # Descriptors of the lists of the supervisor's and the worker's children.
        self.events = open_first(OOM_FILES) if is_alone else None
        self.usage = open_first(CPU_FILES) if is_alone else None
        whole, own = self.group_seconds(), time.process_time()
        if whole is None or not own <= whole + TICK_MAX <= own + START_SECONDS:
            self.usage = None  # It counts something else, such as the whole machine, or nothing.
        self.ooms = self.oom_kills()

    def begin(self, pid):
        """The worker is this process."""
        self.worker, self.exit = pid, None
        self.sizes = open_first(("/proc/%d/statm" % pid,))
        self.families = [open_first(("/proc/%d/task/%d/children" % (of, of),)) for of in (os.getpid(), pid)]

    def forget_worker(self):
        """Nothing of it is left."""
        for descriptor in (self.sizes, *self.families):
            if descriptor is not None:
                os.close(descriptor)
        self.sizes, self.families, self.exit = None, [], None

    def is_family(self):
        """Whether there are more processes than the worker, as far as that's quickly known."""
        try:
            own, of_worker = [os.pread(descriptor, 64, 0) for descriptor in self.families]
        except (OSError, TypeError, ValueError):
            return True  # This system doesn't tell.
        return len(own.split()) > 1 or bool(of_worker.strip())

    def seconds(self):
        """Processor time of the worker and of all that it started, so far."""
        return self.ended + self.worker_seconds() + sum(self.known.values())

    def worker_seconds(self):
        if self.worker is None:
            return 0.0
        try:
            return time.clock_gettime((~self.worker << 3) | CLOCK_OF_PROCESS)
        except (OSError, OverflowError):
            return self.stat_seconds(self.worker)

    @staticmethod
    def stat_seconds(pid, first=11):
        """Of the process, unless `first` is 13, and of the children that it has waited for: proc(5)."""
        try:
            with open("/proc/%d/stat" % pid, "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            return sum(map(int, fields[first:15])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return 0.0

    def look(self):
        """Counts the living descendants of the worker, and those that it waited for."""
        self.looked = time.monotonic()
        whole = self.group_seconds()
        if whole is not None:
            # The kernel's own sum has also those that nobody waited for.
            others = whole - time.process_time() - self.worker_seconds() - self.ended
            self.known = {0: max(others, self.known.get(0, 0.0))}
        elif self.worker is not None:
            self.known = {pid: self.stat_seconds(pid, 13 if pid == self.worker else 11) for pid in self.tree()}

    def group_seconds(self):
        """Processor time of all that ever ran in the container, if the system tells."""
        try:
            text = os.pread(self.usage, 256, 0)
            if text.startswith(b"usage_usec "):
                return int(text.split(None, 2)[1]) / 1e6
            return int(text) / 1e9
        except (OSError, TypeError, ValueError, IndexError):
            return None

    def tree(self):
        """Every process below this one."""
        if self.is_alone:
            try:
                return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
            except OSError:
                return []
        found, open_ = [], [os.getpid()]
        while open_ and len(found) < 100_000:
            for child in children(open_.pop()):
                found.append(child)
                open_.append(child)
        return found

    def reap(self):
        """Takes note of what ended; whether the worker is among them."""
        died = False
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return died
            if pid == 0:
                return died
            if self.usage is None:
                self.ended += usage.ru_utime + usage.ru_stime
                self.known.pop(pid, None)
            if pid == self.worker:
                self.exit, self.worker, died = status, None, True
                if self.usage is not None:
                    self.look()

    def signal(self, number):
        if self.worker is not None:
            try:
                os.kill(self.worker, number)
            except ProcessLookupError:
                pass

    def kill(self):
        """Ends the whole tree; what is in the middle of starting more of itself is met again."""
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline:
            if self.is_alone and os.getpid() == 1:
                try:
                    os.kill(-1, signal.SIGKILL)
                except OSError:
                    pass
            left = self.tree()
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            self.reap()
            if not self.tree():
                break
            time.sleep(0.001)
        if self.usage is None:
            self.known = {}

    def resident_kib(self):
        try:
            return int(os.pread(self.sizes, 256, 0).split()[1]) * PAGE_KIB
        except (OSError, TypeError, ValueError, IndexError):
            return 0

    def oom_kills(self):
        """How often the container's memory limit has killed a process."""
        try:
            lines = os.pread(self.events, 4096, 0).splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith(b"oom_kill "))
        except (OSError, TypeError, ValueError, IndexError):
            return 0

    def was_starved(self):
        before, self.ooms = self.ooms, self.oom_kills()
        return self.ooms > before


def open_first(paths):
    for path in paths:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass
    return None


def children(pid):
    try:
        found = []
        for thread in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, thread)) as file:
                found += map(int, file.read().split())
        return found
    except (OSError, ValueError):
        return []


class Watch:
    """The limit on what a turn computes."""

    def __init__(self, processes):
        self.processes = processes
        self.begun = self.soft = self.hard = None
        self.overdue = None  # When a worker that has to be ended is ended without the host.
        self.grace = self.since = 0.0

    def begin(self, compute, grace):
        if len(self.processes.known) > 1 or self.processes.usage is not None:
            self.processes.look()  # What the turns before have left behind went on.
        self.begun, self.since = self.processes.seconds(), time.monotonic()
        self.processes.looked = self.since
        self.soft, self.hard, self.grace = self.begun + compute, None, grace
        self.overdue = None

    def end(self):
        """The turn is over. What it has left behind isn't to be the next one's."""
        self.soft = self.hard = self.overdue = None
        if self.is_long() or self.processes.is_family():
            self.processes.look()

    def stopped(self):
        """The worker was asked to stop: from now on it has its grace."""
        if self.hard is None and self.begun is not None:
            self.soft, self.hard = None, self.processes.seconds() + self.grace

    def is_long(self):
        """Whether the turn has lasted long enough to fill a memory."""
        return time.monotonic() - self.since > LONG_SECONDS

    def check(self):
        """What there is to do: "soft", "hard", later "overdue", or nothing."""
        if self.overdue is not None:
            if time.monotonic() < self.overdue:
                return None
            self.overdue = None
            return "overdue"
        bound = self.hard if self.soft is None else self.soft
        if bound is None:
            return None
        if time.monotonic() - self.processes.looked > TICK_MIN:
            self.processes.look()
        if self.processes.seconds() < bound:
            return None
        if self.soft is not None:
            return "soft"
        self.hard, self.overdue = None, time.monotonic() + HOST_SECONDS
        return "hard"

    def spent(self):
        return 0.0 if self.begun is None else max(0.0, self.processes.seconds() - self.begun)

    def timeout(self):
        """Milliseconds until it has to be looked at again; -1: never."""
        if self.overdue is not None:
            return int(max(TICK_MIN, self.overdue - time.monotonic()) * 1000)
        bound = self.hard if self.soft is None else self.soft
        if bound is None:
            return -1
        left = bound - self.processes.seconds()
        return int(min(TICK_MAX, max(TICK_MIN, left)) * 1000)
