"""Threads where there are none: tasks run one inside the other, and their model calls leave as one batch.

Models write `with ThreadPoolExecutor(8) as pool: list(pool.map(ask, chunks))`, and WASI cannot start a thread. Here a
submitted task is queued and starts when somebody needs a result. A task that calls `llm_query` while other tasks are
queued does not call the host yet: it leaves its prompts in `Scheduler.waiting` and runs the next task on top of its own
stack. The innermost task, for which nothing is left to start, sends all waiting prompts at once; then each returns with
its own response, last in first out. A task that calls no model simply runs to its end.

What cannot work: a task that waits for something which only a task *below* it on the stack can do. That is reported as
a deadlock instead of hanging.
"""

import collections
import concurrent.futures as futures
import concurrent.futures.thread as futures_thread
import functools
import itertools
import sys
import threading

from . import locks

NESTED_MAX = 64
STACK_RESERVE = 250  # Python frames left for the work of the task itself.
WORKERS_DEFAULT = 32
_Future, _Thread = futures.Future, threading.Thread
_result, _exception = _Future.result, _Future.exception
_real_wait, _real_current = futures.wait, threading.current_thread
_getframe, _getrecursionlimit = sys._getframe, sys.getrecursionlimit


class Stuck(BaseException):
    """Ends a daemon-like task that waits for something that cannot happen any more (a worker on an empty queue)."""


class Deadlock(RuntimeError):
    pass


class Request:
    """The prompts of one suspended task."""

    __slots__ = ("batched", "error", "kind", "model", "prompts", "responses")

    def __init__(self, kind, prompts, model, batched):
        self.kind, self.prompts, self.model, self.batched = kind, prompts, model, batched
        self.responses = self.error = None


class Task:
    """A callable that was given to a pool or a thread."""

    __slots__ = ("done", "owner", "run", "started", "thread")

    def __init__(self, run, owner, thread=None):
        self.run, self.owner, self.thread = run, owner, thread
        self.started = self.done = False


class Scheduler:
    """Starts tasks on the current stack and gathers their model calls."""

    def __init__(self, send):
        self.send = send  # (kind, prompts, model, batched) -> responses: one crossing.
        self.queue = collections.deque()
        self.running = []
        self.waiting = []
        self.held = 0  # Locks that are locked; see kaa_agent.locks.
        self.exhausted = set()  # Semaphores with nothing left.

    def submit(self, task):
        self.queue.append(task)
        return task

    def startable(self):
        """The next task that may start on top of this stack, taken from the queue."""
        if not self.queue or len(self.running) >= NESTED_MAX or not _stack_left():
            return None
        for index, task in enumerate(self.queue):
            workers = getattr(task.owner, "_max_workers", None)
            if workers is None or sum(other.owner is task.owner for other in self.running) < workers:
                del self.queue[index]
                return task
        return None

    def run(self, task):
        self.running.append(task)
        task.started = True
        try:
            task.run()
        except Stuck:
            pass
        finally:
            task.done = True
            if task in self.running:
                self.running.remove(task)

    def run_one(self):
        task = self.startable()
        if task is None:
            return False
        self.run(task)
        return True

    def drive(self, finished):
        """Runs tasks until `finished()`; False when nothing is left to run before that."""
        while not finished():
            if not self.run_one():
                return finished()
        return True

    def drain(self):
        """Runs everything that is queued: the end of a cell."""
        if self.queue:
            self.drive(lambda: False)
        # A lock that is still locked now was forgotten: it must not stop the gathering in later cells.
        self.held = 0
        self.exhausted.clear()

    def let_go(self):
        """A lock was released, perhaps one that an earlier cell had locked."""
        self.held = max(0, self.held - 1)

    def abandon(self):
        """Forgets what is queued, after the cell was stopped."""
        self.queue.clear()
        del self.running[:], self.waiting[:]
        self.held = 0
        self.exhausted.clear()

    def ask(self, kind, prompts, model, batched):
        """A model call, from a task or from the cell itself."""
        if not self.queue and not self.waiting:
            return self.send(kind, prompts, model, batched)
        request = Request(kind, prompts, model, batched)
        self.waiting.append(request)
        try:
            while request.responses is None and request.error is None:
                if self.held or self.exhausted or not self.run_one():
                    self.flush()
        finally:
            if request in self.waiting:
                self.waiting.remove(request)
        if request.error is not None:
            raise request.error
        return request.responses

    def flush(self):
        """One crossing for each (kind, model) among the waiting prompts."""
        groups, waiting, self.waiting = {}, self.waiting, []
        for request in waiting:
            groups.setdefault((request.kind, request.model), []).append(request)
        for (kind, model), requests in groups.items():
            prompts = list(itertools.chain.from_iterable(request.prompts for request in requests))
            batched = len(requests) > 1 or requests[0].batched
            try:
                responses = iter(self.send(kind, prompts, model, batched))
            except Exception as error:
                for request in requests:
                    request.error = error
                continue
            for request in requests:
                request.responses = list(itertools.islice(responses, len(request.prompts)))

    def stuck(self, what):
        """Nothing can make progress: ends the innermost thread, or tells the cell."""
        if self.running and self.running[-1].thread is not None:
            raise Stuck
        raise Deadlock("deadlock: %s; threads run one after another here" % what)


def _stack_left():
    depth, frame, limit = 0, _getframe(), _getrecursionlimit() - STACK_RESERVE
    while frame is not None and depth < limit:
        depth, frame = depth + 1, frame.f_back
    return depth < limit


def _make_futures(scheduler):
    """`ThreadPoolExecutor` and its futures."""

    class TaskFuture(_Future):
        def _drive(self, timeout):
            if not scheduler.drive(self.done) and timeout is None:
                scheduler.stuck("the result of a task that is still running was requested")

        def result(self, timeout=None):
            self._drive(timeout)
            return _result(self, 0)

        def exception(self, timeout=None):
            self._drive(timeout)
            return _exception(self, 0)

    class ThreadPoolExecutor(futures.Executor):
        """Runs tasks on the calling stack; see kaa_agent.threads."""

        def __init__(self, max_workers=None, thread_name_prefix="", initializer=None, initargs=()):
            if max_workers is not None and max_workers <= 0:
                raise ValueError("max_workers must be greater than 0")
            self._max_workers = max_workers or WORKERS_DEFAULT
            self._initialize = functools.partial(initializer, *initargs) if initializer is not None else None
            self._shutdown = False
            self._futures = []

        def submit(self, fn, /, *args, **kwargs):
            if self._shutdown:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future = TaskFuture()
            if len(self._futures) > 1000:
                self._futures = [old for old in self._futures if not old.done()]
            self._futures.append(future)
            scheduler.submit(Task(functools.partial(self._run, future, fn, args, kwargs), self))
            return future

        def _run(self, future, fn, args, kwargs):
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._initialize is not None:
                    initialize, self._initialize = self._initialize, None
                    initialize()
                result = fn(*args, **kwargs)
            except (Exception, SystemExit) as error:
                future.set_exception(error)
            except BaseException as error:  # A stop belongs to the whole cell.
                future.set_exception(error)
                raise
            else:
                future.set_result(result)

        def shutdown(self, wait=True, *, cancel_futures=False):
            self._shutdown = True
            pending, self._futures = self._futures, []
            if cancel_futures:
                for future in pending:
                    future.cancel()
            if wait:
                scheduler.drive(lambda: all(future.done() for future in pending))

    ThreadPoolExecutor.__module__ = "concurrent.futures.thread"
    ThreadPoolExecutor.__qualname__ = "ThreadPoolExecutor"
    return ThreadPoolExecutor


def _make_waiting(scheduler):
    """`concurrent.futures.wait` and `as_completed`."""

    def wait(fs, timeout=None, return_when=futures.ALL_COMPLETED):
        fs = set(fs)

        def finished():
            done = [future for future in fs if future.done()]
            if len(done) == len(fs) or (done and return_when == futures.FIRST_COMPLETED):
                return True
            failed = (future for future in done if not future.cancelled() and _exception(future, 0) is not None)
            return return_when == futures.FIRST_EXCEPTION and next(failed, None) is not None

        if not scheduler.drive(finished) and timeout is None:
            scheduler.stuck("wait() for tasks that are still running")
        return _real_wait(fs, 0, return_when)

    def as_completed(fs, timeout=None):
        pending = list(dict.fromkeys(fs))
        while pending:
            if not scheduler.drive(lambda: any(future.done() for future in pending)):
                if timeout is not None:
                    raise futures.TimeoutError("%d futures unfinished" % len(pending))
                scheduler.stuck("as_completed() for tasks that are still running")
            ready = [future for future in pending if future.done()]
            pending = [future for future in pending if not future.done()]
            yield from ready

    return wait, as_completed


def _make_thread(scheduler):
    """The methods of `threading.Thread` that need a thread."""
    numbers = itertools.count(2)

    def start(self):
        if not getattr(self, "_initialized", False):
            raise RuntimeError("thread.__init__() not called")
        if self._started.is_set():
            raise RuntimeError("threads can only be started once")

        def body():
            try:
                self.run()
            except (SystemExit, Stuck):
                pass
            except Exception:
                threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), self]))

        self._ident = next(numbers)
        self._started.set()
        self._kaa_task = scheduler.submit(Task(body, None, self))

    def join(self, timeout=None):
        task = getattr(self, "_kaa_task", None)
        if task is None:
            raise RuntimeError("cannot join thread before it is started")
        if any(other.thread is self for other in scheduler.running[-1:]):
            raise RuntimeError("cannot join current thread")
        if not scheduler.drive(lambda: task.done) and timeout is None:
            scheduler.stuck("join() of a thread that is still running")

    def is_alive(self):
        task = getattr(self, "_kaa_task", None)
        return task is not None and not task.done

    def current_thread():
        thread = scheduler.running[-1].thread if scheduler.running else None
        return thread if thread is not None else _real_current()

    return start, join, is_alive, current_thread


def _patch_pools(scheduler, executor):
    """`multiprocessing.pool.ThreadPool`, where multiprocessing can be imported at all."""
    try:
        import multiprocessing.pool as pool
    except ImportError:
        return
    from .pools import make_thread_pool

    pool.ThreadPool = make_thread_pool(scheduler, executor)


def activate(send):
    """Replaces what needs threads, in this process, for good. Returns the scheduler."""
    scheduler = Scheduler(send)
    executor = _make_futures(scheduler)
    wait, as_completed = _make_waiting(scheduler)
    for module in (futures, futures_thread):
        module.ThreadPoolExecutor = executor
    for module in (futures, futures._base):
        module.wait, module.as_completed = wait, as_completed
    _Thread.start, _Thread.join, _Thread.is_alive, threading.current_thread = _make_thread(scheduler)
    locks.activate(scheduler)
    _patch_pools(scheduler, executor)
    return scheduler
