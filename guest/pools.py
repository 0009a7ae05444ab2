"""`multiprocessing.pool.ThreadPool` on top of the threads shim."""


def _result_class(scheduler):
    class AsyncResult:
        """What `apply_async` and `map_async` return."""

        def __init__(self, futures, finish, callback=None, error_callback=None):
            self._futures, self._finish = futures, finish
            self._callback, self._error_callback = callback, error_callback
            if callback is not None or error_callback is not None:
                for future in futures:
                    future.add_done_callback(self._one_done)

        def _one_done(self, _future):
            if not self.ready():
                return
            try:
                value = self.get()
            except Exception as error:
                if self._error_callback is not None:
                    self._error_callback(error)
            else:
                if self._callback is not None:
                    self._callback(value)

        def ready(self):
            return all(future.done() for future in self._futures)

        def wait(self, timeout=None):
            scheduler.drive(self.ready)

        def successful(self):
            if not self.ready():
                raise ValueError("%r not ready" % self)
            return all(future.exception() is None for future in self._futures)

        def get(self, timeout=None):
            return self._finish([future.result(timeout) for future in self._futures])

    return AsyncResult


def make_thread_pool(scheduler, executor):
    """The class that replaces `ThreadPool`."""
    result_class = _result_class(scheduler)

    class ThreadPool:
        """Runs tasks on the calling stack; see kaa_agent.threads."""

        def __init__(self, processes=None, initializer=None, initargs=()):
            self._executor = executor(processes, "", initializer, initargs)

        def apply(self, func, args=(), kwds=None):
            return self.apply_async(func, args, kwds).get()

        def apply_async(self, func, args=(), kwds=None, callback=None, error_callback=None):
            future = self._executor.submit(func, *args, **(kwds or {}))
            return result_class([future], lambda values: values[0], callback, error_callback)

        def map(self, func, iterable, chunksize=None):
            return self.map_async(func, iterable).get()

        def map_async(self, func, iterable, chunksize=None, callback=None, error_callback=None):
            futures = [self._executor.submit(func, item) for item in iterable]
            return result_class(futures, list, callback, error_callback)

        def starmap(self, func, iterable, chunksize=None):
            return self.starmap_async(func, iterable).get()

        def starmap_async(self, func, iterable, chunksize=None, callback=None, error_callback=None):
            futures = [self._executor.submit(func, *args) for args in iterable]
            return result_class(futures, list, callback, error_callback)

        def imap(self, func, iterable, chunksize=1):
            return iter([*self._executor.map(func, iterable)])

        imap_unordered = imap

        def close(self):
            self._executor.shutdown(wait=False)

        def terminate(self):
            self._executor.shutdown(wait=False, cancel_futures=True)

        def join(self):
            scheduler.drain()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.terminate()

    return ThreadPool
