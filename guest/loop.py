"""asyncio without sockets: an event loop whose selector only sleeps.

CPython's own loop makes a socket pair to be woken by other threads. WASI has neither, and needs neither: whoever could
wake the loop runs on the loop's own stack.
"""

import asyncio
import asyncio.selector_events
import selectors
import time

_sleep = time.sleep


class SleepingSelector(selectors._BaseSelectorImpl):
    """Watches nothing; waiting is sleeping, or running the queued tasks of the threads shim."""

    run_tasks = None

    def select(self, timeout=None):
        if self.run_tasks is not None and self.run_tasks():
            return []
        if timeout is None:
            raise RuntimeError("deadlock: every asyncio task waits, and nothing is left to wake one")
        if timeout > 0:
            _sleep(timeout)
        return []


def _make_loop_class(run_tasks):
    class SleepingEventLoop(asyncio.selector_events.BaseSelectorEventLoop):
        """The event loop of a guest without sockets."""

        def __init__(self, selector=None):
            selector = SleepingSelector()
            selector.run_tasks = run_tasks
            super().__init__(selector)

        def _make_self_pipe(self):
            pass

        def _close_self_pipe(self):
            pass

        def _write_to_self(self):
            pass

    return SleepingEventLoop


def activate(run_tasks=None):
    """Makes it the loop of `asyncio.run` and `asyncio.new_event_loop`, in this process, for good.

    `run_tasks()` runs a queued thread task and says whether there was one.
    """
    loop_class = _make_loop_class(run_tasks)
    events = asyncio.events
    get_policy = getattr(events, "_get_event_loop_policy", None) or events.get_event_loop_policy
    type(get_policy())._loop_factory = loop_class
    for name in ("SelectorEventLoop", "EventLoop"):
        setattr(asyncio, name, loop_class)
        unix_events = getattr(asyncio, "unix_events", None)
        if unix_events is not None and hasattr(unix_events, name):
            setattr(unix_events, name, loop_class)
    return loop_class
