"""Locks, conditions and semaphores for the threads shim.

On WASI a C lock that has to wait is a trap, which costs the session its cell; so nothing here ever waits in one.
Where one stack runs everything, "wait until another thread lets go" means: run queued tasks, and if that does not help,
nothing will. The scheduler also has to know what is held: a task that waits for its model inside of `with lock:` must
not have another task started on top of it, which would want the same lock.
"""

import queue
import threading
import time

_allocate, _sleep = threading.Lock, time.sleep
_Condition, _Semaphore, _BoundedSemaphore = threading.Condition, threading.Semaphore, threading.BoundedSemaphore


def _make_lock(scheduler):
    class Lock:
        """`threading.Lock` without threads."""

        __slots__ = ("__weakref__", "_lock")

        def __init__(self):
            self._lock = _allocate()

        def acquire(self, blocking=True, timeout=-1):
            if not self._lock.acquire(False):
                if not blocking:
                    return False
                if not scheduler.drive(lambda: not self._lock.locked()):
                    if timeout < 0:
                        scheduler.stuck("a lock that nobody is left to release")
                    _sleep(timeout)
                    return False
                self._lock.acquire(False)
            scheduler.held += 1
            return True

        def release(self):
            self._lock.release()
            scheduler.let_go()

        def locked(self):
            return self._lock.locked()

        def _at_fork_reinit(self):
            self._lock = _allocate()

        def __enter__(self):
            return self.acquire()

        def __exit__(self, *_):
            self.release()

        def __del__(self):
            if self._lock.locked():
                scheduler.let_go()

    Lock.__module__, Lock.__qualname__ = "threading", "Lock"
    return Lock


def _make_wait(scheduler):
    """`Condition.wait`, on which `Event`, `Queue`, `Semaphore` and `Barrier` stand."""

    def wait(self, timeout=None):
        if not self._is_owned():
            raise RuntimeError("cannot wait on un-acquired lock")
        waiter = _allocate()
        waiter.acquire()
        self._waiters.append(waiter)
        saved = self._release_save()
        try:
            notified = scheduler.drive(lambda: not waiter.locked())
            if not notified:
                if timeout is None:
                    scheduler.stuck("a wait that nobody is left to end")
                if timeout > 0:
                    _sleep(timeout)
        finally:
            self._acquire_restore(saved)
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        return notified

    return wait


def _patch_semaphores(scheduler):
    """Lets the scheduler know of semaphores that are used up: what waits for them would wait for the stack below."""
    original, original_init = _Semaphore.acquire, _Semaphore.__init__

    def __init__(self, value=1):
        original_init(self, value)
        self._kaa_limits = value > 0  # One that starts at 0 is a signal, nobody holds it.

    def acquire(self, blocking=True, timeout=None):
        acquired = original(self, blocking, timeout)
        if acquired and self._value == 0 and getattr(self, "_kaa_limits", False):
            scheduler.exhausted.add(id(self))
        return acquired

    def make_release(release):
        def noting(self, *args, **kwargs):
            scheduler.exhausted.discard(id(self))
            return release(self, *args, **kwargs)

        return noting

    _Semaphore.__init__ = __init__
    _Semaphore.acquire = _Semaphore.__enter__ = acquire
    for kind in (_Semaphore, _BoundedSemaphore):
        kind.release = make_release(kind.release)


def activate(scheduler):
    """Replaces what would block, in this process, for good."""
    threading.Lock = _make_lock(scheduler)
    _Condition.wait = _make_wait(scheduler)
    _patch_semaphores(scheduler)
    simple = getattr(queue, "_PySimpleQueue", None)
    if simple is not None:
        queue.SimpleQueue = simple  # The C one waits in a C lock.
