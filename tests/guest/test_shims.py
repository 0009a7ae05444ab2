"""The stand-ins for threads and for asyncio's socket pair, forced on in an ordinary CPython."""

import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(__file__))
from harness import Guest

POOL = "from concurrent.futures import *\nimport concurrent.futures as cf, threading\n"
# (name, cell, stdout, sizes of the batches that reached the host)
CASES = [
    ("map", POOL + "with ThreadPoolExecutor(8) as ex: print(list(ex.map(llm_query, 'abcd')))",
     "['<a>', '<b>', '<c>', '<d>']\n", [4]),
    ("map of a function", POOL + "def ask(x): return llm_query(x).upper()\n"
     "with ThreadPoolExecutor(8) as ex: print(list(ex.map(ask, 'abc')))", "['<A>', '<B>', '<C>']\n", [3]),
    ("max_workers", POOL + "with ThreadPoolExecutor(max_workers=2) as ex: print(len(list(ex.map(llm_query, 'abcde'))))",
     "5\n", [2, 2, 1]),
    ("default workers", POOL + "with ThreadPoolExecutor() as ex: print(len(list(ex.map(llm_query, map(str, range(40))))))",
     "40\n", [32, 8]),
    ("nesting is bounded", POOL + "with ThreadPoolExecutor(1000) as ex:\n"
     "    print(len(list(ex.map(llm_query, map(str, range(200))))))", "200\n", None),
    ("submit and result", POOL + "ex = ThreadPoolExecutor(4)\nfs = [ex.submit(llm_query, c) for c in 'abc']\n"
     "print([f.result() for f in fs])", "['<a>', '<b>', '<c>']\n", [3]),
    ("as_completed", POOL + "ex = ThreadPoolExecutor(4)\nfs = {ex.submit(llm_query, c): c for c in 'abc'}\n"
     "print(sorted(fs[f] + f.result() for f in as_completed(fs)))", "['a<a>', 'b<b>', 'c<c>']\n", [3]),
    ("wait", POOL + "ex = ThreadPoolExecutor(4)\nfs = [ex.submit(llm_query, c) for c in 'ab']\n"
     "done, rest = cf.wait(fs)\nprint(len(done), len(rest))\n"
     "print(len(wait([ex.submit(pow, 2, 3)], return_when=FIRST_COMPLETED).done))", "2 0\n1\n", [2]),
    ("not models", POOL + "with ThreadPoolExecutor() as ex: print(list(ex.map(lambda x: x * x, range(5))))",
     "[0, 1, 4, 9, 16]\n", []),
    ("exception", POOL + "ex = ThreadPoolExecutor()\nf = ex.submit(lambda: 1/0)\nprint(repr(f.exception()))\n"
     "try: f.result()\nexcept ZeroDivisionError: print('raised')", "ZeroDivisionError('division by zero')\nraised\n", []),
    ("one fails", POOL + "def ask(x):\n    r = llm_query(x)\n    if x == 'b': raise ValueError(x)\n    return r\n"
     "ex = ThreadPoolExecutor()\nfs = [ex.submit(ask, c) for c in 'abc']\n"
     "print([f.result() if not f.exception() else repr(f.exception()) for f in fs])",
     "['<a>', \"ValueError('b')\", '<c>']\n", [3]),
    ("callback and cancel", POOL + "ex = ThreadPoolExecutor()\na, b = ex.submit(pow, 2, 2), ex.submit(pow, 2, 3)\n"
     "print(b.cancel(), b.cancelled())\na.add_done_callback(lambda f: print('done', f.result()))\nprint(a.result(timeout=5))",
     "True True\ndone 4\n4\n", []),
    ("different kinds", POOL + "with ThreadPoolExecutor() as ex:\n"
     "    fs = [ex.submit(f, *a) for f, *a in ((llm_query, 'a'), (rlm_query, 'b'), (llm_query, 'c', 'm'), (llm_query, 'd'))]\n"
     "print([f.result() for f in fs])", "['<a>', '<b>', '<c>', '<d>']\n", [2, 1, 1]),
    ("batched in tasks", POOL + "with ThreadPoolExecutor() as ex: print(list(ex.map(llm_query_batched, [['a', 'b'], ['c']])))",
     "[['<a>', '<b>'], ['<c>']]\n", [3]),
    ("two rounds", POOL + "def ask(x): return llm_query(llm_query(x))\n"
     "with ThreadPoolExecutor() as ex: print(list(ex.map(ask, 'ab')))", "['<<a>>', '<<b>>']\n", [2, 1, 1]),
    ("nested pools", POOL + "def outer(x):\n    with ThreadPoolExecutor() as ex: return list(ex.map(llm_query, x))\n"
     "with ThreadPoolExecutor() as ex: print(list(ex.map(outer, ['ab', 'cd'])))", "[['<a>', '<b>'], ['<c>', '<d>']]\n", None),
    ("threads", POOL + "r = {}\ndef work(x): r[x] = llm_query(x)\n"
     "ts = [threading.Thread(target=work, args=(c,)) for c in 'abcde']\nfor t in ts: t.start()\nprint(ts[0].is_alive())\n"
     "for t in ts: t.join()\nprint(sorted(r.items())[0], len(r), ts[0].is_alive())", "True\n('a', '<a>') 5 False\n", [5]),
    ("thread at the end of the cell", POOL + "t = threading.Thread(target=lambda: print(threading.current_thread().name), "
     "name='me')\nt.start()\nprint('first')", "first\nme\n", []),
    ("thread raises", POOL + "t = threading.Thread(target=lambda: 1/0)\nt.start()\nt.join()\nprint('on')", "on\n", []),
    ("thread twice", POOL + "t = threading.Thread(target=print)\nt.start()\ntry: t.start()\nexcept RuntimeError as e: print(e)",
     "threads can only be started once\n\n", []),
    ("lock", POOL + "lock, r = threading.Lock(), []\ndef work(x):\n    y = llm_query(x)\n    with lock: r.append(y)\n"
     "with ThreadPoolExecutor() as ex: list(ex.map(work, 'abc'))\nprint(sorted(r))", "['<a>', '<b>', '<c>']\n", [3]),
    ("lock around the call", POOL + "lock, r = threading.Lock(), []\ndef work(x):\n    with lock: r.append(llm_query(x))\n"
     "with ThreadPoolExecutor() as ex: list(ex.map(work, 'abc'))\nprint(r)", "['<a>', '<b>', '<c>']\n", [1, 1, 1]),
    ("semaphore", POOL + "s = threading.Semaphore(2)\ndef work(x):\n    with s: return llm_query(x)\n"
     "with ThreadPoolExecutor() as ex: print(list(ex.map(work, 'abcd')))", "['<a>', '<b>', '<c>', '<d>']\n", [2, 2]),
    ("event", POOL + "e = threading.Event()\nthreading.Thread(target=e.set).start()\nprint(e.wait(5))", "True\n", []),
    ("queue and workers", POOL + "import queue\nq, r = queue.Queue(), []\ndef worker():\n    while True:\n        x = q.get()\n"
     "        r.append(llm_query(x))\n        q.task_done()\n"
     "for _ in range(3): threading.Thread(target=worker, daemon=True).start()\nfor c in 'abcde': q.put(c)\nq.join()\n"
     "print(sorted(r))", "['<a>', '<b>', '<c>', '<d>', '<e>']\n", None),
    ("queue with sentinels", POOL + "import queue\nq, r = queue.Queue(), []\ndef worker():\n"
     "    for x in iter(q.get, None): r.append(llm_query(x))\nts = [threading.Thread(target=worker) for _ in range(2)]\n"
     "for t in ts: t.start()\nfor c in 'abcd': q.put(c)\nfor t in ts: q.put(None)\nfor t in ts: t.join()\nprint(len(r))",
     "4\n", None),
    ("simple queue", POOL + "import queue\nq = queue.SimpleQueue()\nthreading.Thread(target=q.put, args=(4,)).start()\n"
     "print(q.get())\ntry: q.get()\nexcept RuntimeError as e: print(str(e)[:8])", "4\ndeadlock\n", []),
    ("barrier", POOL + "b = threading.Barrier(2)\nr = []\ndef f(): r.append(b.wait(1))\n"
     "ts = [threading.Thread(target=f) for _ in range(2)]\nfor t in ts: t.start()\nfor t in ts: t.join()\nprint(sorted(r))",
     "[0, 1]\n", []),
    ("rlock and condition", POOL + "c = threading.Condition()\nr = []\ndef f():\n    with c:\n        r.append(1)\n        c.notify()\n"
     "threading.Thread(target=f).start()\nwith c:\n    while not r: c.wait()\nprint(r)", "[1]\n", []),
    ("deadlock", POOL + "import queue\ntry: queue.Queue().get()\nexcept RuntimeError as e: print(str(e)[:8])", "deadlock\n", []),
    ("lock deadlock", POOL + "l = threading.Lock()\nl.acquire()\ntry: l.acquire()\nexcept RuntimeError as e: print(str(e)[:8])\n"
     "print(l.acquire(timeout=0.01), l.acquire(False), l.locked())", "deadlock\nFalse False True\n", []),
    ("thread pool", "from multiprocessing.pool import ThreadPool\nwith ThreadPool(4) as p:\n    print(p.map(llm_query, 'abc'))\n"
     "    print(p.apply_async(pow, (2, 3)).get(), p.starmap(pow, [(2, 2)]), list(p.imap(abs, [-1])))",
     "['<a>', '<b>', '<c>']\n8 [4] [1]\n", [3]),
    ("stack budget", POOL + "import sys\nsys.setrecursionlimit(400)\nwith ThreadPoolExecutor(64) as ex:\n"
     "    print(len(list(ex.map(llm_query, map(str, range(100))))))\nsys.setrecursionlimit(1000)", "100\n", None),
    # asyncio
    ("asyncio", "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n    return 5\nprint(asyncio.run(main()))", "5\n", []),
    ("gather to_thread", "import asyncio\nasync def main():\n"
     "    return await asyncio.gather(*[asyncio.to_thread(llm_query, c) for c in 'abc'])\nprint(asyncio.run(main()))",
     "['<a>', '<b>', '<c>']\n", [3]),
    ("run_in_executor", "import asyncio\nfrom concurrent.futures import ThreadPoolExecutor\nasync def main():\n"
     "    loop = asyncio.get_running_loop()\n    with ThreadPoolExecutor(8) as ex:\n"
     "        return await asyncio.gather(*[loop.run_in_executor(ex, llm_query, c) for c in 'ab'])\nprint(asyncio.run(main()))",
     "['<a>', '<b>']\n", [2]),
    ("asyncio tools", "import asyncio\nasync def main():\n    q, s, r = asyncio.Queue(), asyncio.Semaphore(2), []\n"
     "    async def work(i):\n        async with s:\n            await asyncio.sleep(0.001)\n            r.append(i)\n"
     "            await q.put(i)\n    await asyncio.gather(*[work(i) for i in range(4)])\n    print(sorted(r), q.qsize(), await q.get())\n"
     "    try: await asyncio.wait_for(asyncio.sleep(10), 0.01)\n    except asyncio.TimeoutError: print('timeout')\n"
     "asyncio.run(main())", "[0, 1, 2, 3] 4 0\ntimeout\n", []),
    ("asyncio deadlock", "import asyncio\nasync def main(): await asyncio.Future()\ntry: asyncio.run(main())\n"
     "except RuntimeError as e: print(str(e)[:8])", "deadlock\n", []),
    ("old style loop", "import asyncio\nloop = asyncio.new_event_loop()\nasync def f(): return 3\n"
     "print(loop.run_until_complete(f()))\nloop.close()", "3\n", []),
]


class Shims(unittest.TestCase):
    make_guest = staticmethod(lambda: Guest("shims"))

    def setUp(self):
        self.guest = self.make_guest()
        self.addCleanup(lambda: self.guest.close())

    def test_cases(self):
        for name, code, stdout, batches in CASES:
            with self.subTest(name):
                try:
                    reply = self.guest.cell(code)
                except EOFError:
                    self.guest.close()
                    self.guest = self.make_guest()
                    raise
                self.assertEqual(reply["stdout"], stdout, reply["stderr"])
                if batches is not None:
                    self.assertEqual([len(call["prompts"]) for call in self.guest.calls], batches)

    def test_errors_raise_in_each_task(self):
        self.guest.request({"op": "configure", "profile": "openenv", "allowed_imports": None})
        self.guest.lm = lambda header, prompts: {"error": "kaput"}
        reply = self.guest.cell("from concurrent.futures import *\nex = ThreadPoolExecutor()\n"
                                "[str(f.exception()) for f in [ex.submit(llm_query, c) for c in 'ab']]")
        self.assertEqual(reply["value"], "['kaput', 'kaput']")


class Stops(unittest.TestCase):
    """A soft stop belongs to the whole cell, wherever it arrives."""

    def check(self, code):
        guest = Guest("shims")
        self.addCleanup(guest.close)
        guest.stop_after(0.4, {"limit": "compute", "message": "m"})
        reply = guest.cell(code)
        self.assertEqual((reply["outcome"], reply.get("limit")), ("raised", "compute"), reply)
        self.assertEqual(reply["exception"]["type"], "LimitReached")
        self.assertEqual(guest.cell("1")["value"], "1")

    def test_in_a_task(self):
        self.check("from concurrent.futures import *\ndef f(x):\n    while x: pass\n"
                   "with ThreadPoolExecutor() as ex:\n    try: list(ex.map(f, [1, 2]))\n    except Exception: pass")

    def test_in_a_thread(self):
        self.check("import threading\ndef f():\n    x = 1\n    while x: pass\nthreading.Thread(target=f).start()")

    def test_in_asyncio(self):
        self.check("import asyncio\nasync def f():\n    x = 1\n    while x: pass\nasync def main():\n"
                   "    return await asyncio.gather(f(), f(), return_exceptions=True)\nasyncio.run(main())")

    def test_in_a_sleeping_loop(self):
        self.check("import asyncio\nasyncio.run(asyncio.sleep(60))")


if __name__ == "__main__":
    unittest.main()
