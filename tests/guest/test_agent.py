"""The agent as the host sees it: requests, cells, reports, profiles, soft stops and hostile code."""

import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(__file__))
from harness import Guest

# (name, cell, what the reply must contain). Keys: stdout, stderr, outcome, value, type, message, final, vars; a list of
# cells runs all of them and looks at the last.
CELLS = [
    ("print", "print(1+1)", {"stdout": "2\n", "value": None, "outcome": "completed"}),
    ("value", "1+1", {"stdout": "", "value": "2"}),
    ("value after statements", "x = 4\nx * 2", {"value": "8", "vars": {"x": "4"}}),
    ("a statement has no value", "x = 4", {"value": None}),
    ("empty", "", {"outcome": "completed", "value": None}),
    ("comment only", "# nothing", {"outcome": "completed"}),
    ("docstring only", '"""text"""', {"value": "'text'"}),
    ("state stays", ["x = 1", "x += 1\nprint(x)"], {"stdout": "2\n"}),
    ("state of a raising cell stays", ["y = 5\n1/0", "print(y)"], {"stdout": "5\n"}),
    ("underscore is not set", ["1+1", "print('_' in globals())"], {"stdout": "False\n"}),
    ("main", "print(__name__)", {"stdout": "__main__\n"}),
    ("clean globals", "print(sorted(k for k in globals() if k.startswith('_')))",
     {"stdout": "['__builtins__', '__doc__', '__loader__', '__name__', '__package__', '__spec__']\n"}),
    ("class", "class A:\n    def f(self): return 1\nprint(A().f(), A.__module__)", {"stdout": "1 __main__\n"}),
    ("pickle", "import pickle\nclass P: pass\nprint(type(pickle.loads(pickle.dumps(P()))).__name__)", {"stdout": "P\n"}),
    ("dataclass", "import dataclasses, typing\n@dataclasses.dataclass\nclass D:\n    x: 'int'\n"
     "print(D(1), typing.get_type_hints(D))", {"stdout": "D(x=1) {'x': <class 'int'>}\n"}),
    ("inspect", ["def f():\n    return 7\n", "import inspect\nprint(inspect.getsource(f))"],
     {"stdout": "def f():\n    return 7\n\n"}),
    ("input", "input()", {"outcome": "raised", "type": "EOFError"}),
    ("exit", "import sys\nsys.exit(3)", {"outcome": "exited", "exit_code": 3, "stderr": "SystemExit: 3\n"}),
    ("exit none", "raise SystemExit", {"outcome": "exited", "exit_code": 0, "stderr": "SystemExit: None\n"}),
    ("exit text", "raise SystemExit('bye')", {"outcome": "exited", "exit_code": 1, "stderr": "SystemExit: bye\n"}),
    ("exit huge", "raise SystemExit(10**5000)", {"outcome": "exited", "exit_code": 1}),
    ("keyboard interrupt", "raise KeyboardInterrupt", {"outcome": "raised", "type": "KeyboardInterrupt"}),
    ("base exception", "raise BaseException('b')", {"outcome": "raised", "type": "BaseException", "message": "b"}),
    ("generator exit", "raise GeneratorExit", {"outcome": "raised", "type": "GeneratorExit"}),
    ("prints before an exception", "print('a')\n1/0", {"stdout": "a\n", "type": "ZeroDivisionError"}),
    ("recursion", "def f(): f()\nf()", {"type": "RecursionError"}),
    ("exit in a function", "def f():\n    raise SystemExit(2)\nf()", {"exit_code": 2}),
    ("crlf", b"x = 1\r\nprint(x)\r\n", {"stdout": "1\n"}),
    ("byte order mark", b"\xef\xbb\xbfprint(1)", {"stdout": "1\n"}),
    ("surrogate output", "print('\\ud800')", {"stdout": "\\ud800\n"}),
    ("null byte", b"x = 1\0", {"outcome": "raised"}),
    ("invalid utf-8", b"x = '\xff'", {"outcome": "raised", "type": "SyntaxError"}),
    ("encoded surrogate", b"x = '\xed\xa0\x80'", {"outcome": "raised", "type": "SyntaxError"}),
    ("indented expression", " 1", {"outcome": "raised", "type": "IndentationError"}),
    ("yield outside", "yield 1", {"outcome": "raised", "type": "SyntaxError"}),
    ("deep parentheses", "(" * 5000 + ")" * 5000, {"outcome": "raised"}),
    ("future import", "from __future__ import annotations\nx: Undefined = 1\nprint(x)", {"stdout": "1\n"}),
    # The globals.
    ("assignment in a line", "x = y = (5) # 6", {"value": None, "names": ["x", "y"]}),
    ("assignment and a value", "x = 5; x", {"value": "5"}),
    ("assignment and a value below", "x = 5\n\n'6'\n", {"value": "'6'"}),
    ("assignment and a value after a return", b"x = 5\rx", {"value": "5"}),
    ("comparison in a line", "1 == 1", {"value": "True"}),
    ("comparison of a name", ["x = 5", "x == 5"], {"value": "True"}),
    ("walrus in a line", "(x := 5)", {"value": "5", "vars": {"x": "5"}}),
    ("keyword in a line", "True = 5", {"type": "SyntaxError"}),
    ("assignment of nothing", "x =", {"type": "SyntaxError"}),
    ("indented assignment", " x = 5", {"type": "IndentationError"}),
    ("llm_query", "llm_query('hi')", {"value": "'<hi>'"}),
    ("llm_query model", "print(llm_query('hi', model='m'))", {"stdout": "<hi>\n"}),
    ("llm_query long", "print(len(llm_query('é' * 5000)))", {"stdout": "5002\n"}),
    ("llm_query surrogate", "print(llm_query('\\ud800' + 'a' * 2000)[:3])", {"outcome": "completed"}),
    ("llm_query messages", "print(llm_query([{'role': 'user', 'content': 'x'}]))",
     {"stdout": "<[{'role': 'user', 'content': 'x'}]>\n"}),
    ("batched", "llm_query_batched(['a', 'b'])", {"value": "['<a>', '<b>']"}),
    ("batched empty", "llm_query_batched([])", {"value": "[]", "calls": 0}),
    ("batched generator", "llm_query_batched(c for c in 'ab')", {"value": "['<a>', '<b>']"}),
    ("batched 10,000", "r = llm_query_batched([str(i) for i in range(10000)])\nprint(len(r), r[9999])",
     {"stdout": "10000 <9999>\n", "calls": 1}),
    ("batched with a bad prompt", "llm_query_batched(['a', None, 'b'])",
     {"value": "['<a>', 'Error: LM query failed - a prompt must be a str or a list of chat messages, not NoneType', '<b>']"}),
    ("batched str", "llm_query_batched('ab')",
     {"value": "['Error: LM query failed - prompts must be a list of prompts, not str']", "calls": 0}),
    ("rlm_query", "rlm_query('hi'), rlm_query_batched(['a'])", {"value": "('<hi>', ['<a>'])", "calls": 2}),
    ("prompt None", "llm_query(None)",
     {"value": "'Error: LM query failed - a prompt must be a str or a list of chat messages, not NoneType'", "calls": 0}),
    ("prompt bytes", "print(llm_query(b'x')[:24])", {"stdout": "Error: LM query failed -\n", "calls": 0}),
    ("prompt with an object", "print(llm_query([object()])[:24])", {"stdout": "Error: LM query failed -\n", "calls": 0}),
    ("prompt str subclass", "class S(str):\n    def __str__(self): return 'no'\nllm_query(S('yes'))", {"value": "'<yes>'"}),
    ("SHOW_VARS empty", "SHOW_VARS()",
     {"value": "'No variables created yet. Use ```repl``` blocks to create variables.'"}),
    ("SHOW_VARS", ["x = 1\n_y = 2", "print(SHOW_VARS())"], {"stdout": "Available variables: {'x': 'int'}\n"}),
    ("FINAL_VAR", ["x = [1]", "FINAL_VAR(' \"x\" ')"], {"value": "'[1]'"}),
    ("FINAL_VAR value", ["s = 'summary text'", "FINAL_VAR(s)"], {"value": "'summary text'"}),
    ("FINAL_VAR unknown", ["x = 1", "print(FINAL_VAR('X'))"],
     {"stdout": "Error: Variable 'X' not found. Available variables: ['x']. You must create and assign a variable BEFORE "
                "calling FINAL_VAR on it.\n"}),
    ("FINAL_VAR none", "print(FINAL_VAR('X'))",
     {"stdout": "Error: Variable 'X' not found. No variables have been created yet. You must create and assign a variable "
                "in a REPL block BEFORE calling FINAL_VAR on it.\n"}),
    ("FINAL_VAR object", "print(FINAL_VAR(42))", {"stdout": "42\n"}),
    # answer
    ("answer", "answer['content'] = 'a'\nanswer['ready'] = True", {"final": "a"}),
    ("answer content after ready", "answer['ready'] = True\nanswer['content'] = 'late'", {"final": "late"}),
    ("answer update", "answer.update(content='u', ready=True)", {"final": "u"}),
    ("answer ior", "answer |= {'content': 'i', 'ready': True}", {"final": "i"}),
    ("answer setdefault", "answer.pop('ready')\nanswer.setdefault('ready', True)", {"final": ""}),
    ("answer behind its back", "dict.update(answer, content='b', ready=True)", {"final": "b"}),
    ("answer rebound", "answer = {'content': 'r', 'ready': True}", {"final": "r"}),
    ("answer rebound to nonsense", ["answer = 5", "print(answer)"],
     {"stdout": "{'content': '', 'ready': False}\n", "final": None}),
    ("answer deleted", ["del answer", "print(answer)"], {"stdout": "{'content': '', 'ready': False}\n"}),
    ("answer once", ["answer['ready'] = True", "x = 1"], {"final": None}),
    ("answer again", ["answer['ready'] = True", "answer['content'] = 'x'", "answer['ready'] = True"], {"final": "x"}),
    ("answer not ready", "answer['content'] = 'x'", {"final": None}),
    ("answer unready", "answer['ready'] = True\nanswer['ready'] = False", {"final": None}),
    ("answer not a str", "answer['content'] = [1]\nanswer['ready'] = 1", {"final": "[1]"}),
    ("answer then exception", "answer['ready'] = True\n1/0", {"final": "", "outcome": "raised"}),
    ("answer hostile content", "class H:\n    def __str__(self): 1/0\nanswer.update(content=H(), ready=True)",
     {"final": "<unrepresentable>"}),
    ("answer hostile ready", "class H:\n    def __bool__(self): 1/0\nanswer['ready'] = H()", {"final": None}),
    ("answer json", "import json, pickle\nprint(json.dumps(answer), type(pickle.loads(pickle.dumps(answer))).__name__)",
     {"stdout": '{"content": "", "ready": false} dict\n'}),
    # Names put back.
    ("reserved replaced", ["llm_query = 1", "llm_query('a')"], {"value": "'<a>'"}),
    ("reserved replaced within the cell", "llm_query = lambda p: 'mine'\nprint(llm_query('a'))", {"stdout": "mine\n"}),
    ("reserved deleted", ["del llm_query, SHOW_VARS", "print(callable(SHOW_VARS), llm_query('a'))"],
     {"stdout": "True <a>\n"}),
    ("globals cleared", ["globals().clear()", "print(llm_query('a'), __name__)"], {"stdout": "<a> __main__\n"}),
    ("builtins name replaced", ["__builtins__ = {}", "print(len('ab'))"], {"stdout": "2\n"}),
    # Reports.
    ("variables", "a = 1\nb = 'x'\n_c = 3\ndef f(): pass\nimport os", {"names": ["a", "b", "f", "os"]}),
    ("variables rebound", ["a = 1\nb = 2", "a = 3"], {"vars": {"a": "3"}, "new": []}),
    ("variables unchanged", ["a = 1", "b = a"], {"names": ["b"]}),
    ("variables grown", ["a = []\nb = []", "a.append(1)"], {"vars": {"a": "[1]"}}),
    ("variables rebound by a function", ["a = 1", "def f():\n    global a\n    a = 'other'\nf()"], {"names": ["a", "f"]}),
    ("variables twice rebound", ["a = 1.5", "a = a * 2\na = a * 2"], {"vars": {"a": "6.0"}}),
    ("variables of many", "for i in range(1000): globals()['v%d' % i] = i", {"count": 200}),
    ("variables hostile", "class H:\n    def __repr__(self): raise SystemExit\nh = H()\ni = [h]",
     {"vars": {"h": "<unrepresentable>", "i": "<unrepresentable>"}, "outcome": "completed"}),
    ("variables cyclic", "a = []\na.append(a)\nd = {}\nd[1] = d", {"vars": {"a": "[[...]]", "d": "{1: {...}}"}}),
    ("variables large", "s = 'x' * 10**7\nl = list(range(10**6))", {"starts": {"s": "'" + "x" * 499, "l": "[0, 1, 2"}}),
    ("variables huge int", "n = 1 << 10_000_000", {"vars": {"n": "<int of 10000001 bits>"}}),
    ("variables lm in repr", "class H:\n    def __repr__(self): return llm_query('r')\nh = H()", {"vars": {"h": "<r>"}}),
    ("odd names", "globals()[1] = 2\nglobals()['a b'] = 3\nglobals()['\\ud800'] = 4", {"outcome": "completed"}),
    # Hostile code.
    ("exception str raises", "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
     {"outcome": "raised", "type": "E"}),
    ("exception str exits", "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
     {"outcome": "raised", "type": "E", "message": "<exception str() failed>"}),
    ("exception class lies", "class E(Exception):\n    __class__ = property(lambda s: SystemExit)\nraise E('x')",
     {"outcome": "raised", "type": "E"}),
    ("exception everything raises", "class E(Exception):\n    def __getattribute__(self, n): raise SystemExit\nraise E('x')",
     {"outcome": "raised", "type": "E"}),
    ("metaclass", "class M(type):\n    __name__ = property(lambda s: 1/0)\n    def __repr__(c): 1/0\n"
     "class A(metaclass=M): pass\na = A()", {"outcome": "completed"}),
    ("metaclass exception", "class M(type):\n    __name__ = property(lambda s: 1/0)\n    "
     "__module__ = __name__\nclass E(Exception, metaclass=M): pass\nraise E('x')", {"outcome": "raised", "type": "E"}),
    ("json replaced", ["import json\njson.dumps = json.loads = None\njson.encoder.JSONEncoder.encode = None\n"
     "json.JSONEncoder.iterencode = None\njson.JSONDecoder.decode = None\njson.encoder.c_make_encoder = None\n"
     "json.encoder.encode_basestring = None", "x = {'a': 1.5}\nx"], {"value": "{'a': 1.5}"}),
    ("print replaced", ["import builtins\nbuiltins.print = None", "print('ok')"], {"stdout": "ok\n"}),
    ("builtins replaced", ["import builtins\nfor n in ('repr', 'len', 'isinstance', 'type', 'str', 'exec', 'compile', "
     "'__import__', '__build_class__', 'getattr'):\n    setattr(builtins, n, None)", "class A: pass\nprint(len(repr(A)))"],
     {"stdout": "20\n"}),
    ("builtins deleted", ["import builtins\nbuiltins.__dict__.clear()", "print(len('abc'))"], {"stdout": "3\n"}),
    ("builtins equal", ["import builtins\nclass E:\n    def __eq__(s, o): raise SystemExit\nbuiltins.print = E()", "print(1)"],
     {"stdout": "1\n"}),
    ("stdout replaced", ["import sys, io\nsys.stdout = io.StringIO()\nsys.stderr = None\nprint('lost')", "print('ok')"],
     {"stdout": "ok\n"}),
    ("stdout closed", ["import sys\nsys.stdout.close()\nsys.stderr.close()", "print('ok')"], {"stdout": "ok\n"}),
    ("stdout detached", ["import sys\nsys.stdout.detach()", "print('ok')"], {"stdout": "ok\n"}),
    ("stdout deleted", ["import sys\ndel sys.stdout, sys.stderr, sys.stdin", "print('ok')"], {"stdout": "ok\n"}),
    ("stdout wrapped", ["import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint('a')", "print('b')"],
     {"stdout": "b\n"}),
    ("stdout as a file", "import sys\nsys.stdout.buffer.write(b'x\\n')\nsys.stdout.reconfigure(line_buffering=True)\n"
     "print(sys.stdout.fileno(), sys.stdout.isatty(), sys.stdout.encoding)", {"stdout": "x\n1 False utf-8\n"}),
    ("traceback module replaced", ["import traceback, linecache\ntraceback.TracebackException.__init__ = None\n"
     "linecache.cache = None\nlinecache.getline = None", "1/0"], {"type": "ZeroDivisionError", "in_stderr": "division by zero"}),
    ("settrace", ["import sys\nsys.settrace(lambda *a: 1/0)\nsys.setprofile(lambda *a: 1/0)", "print(1)"], {"stdout": "1\n"}),
    ("modules cleared", ["import sys\nsys.modules.clear()", "print(1)"], {"stdout": "1\n"}),
    ("modules and builtins cleared", ["import sys, builtins\nsys.modules.clear()\nbuiltins.__dict__.clear()",
     "import random, textwrap\nprint(len([1]))"], {"stdout": "1\n"}),
    ("modules replaced", ["import sys\nsys.modules = {}", "import json\nprint(1)"], {"stdout": "1\n"}),
    ("recursion limit", ["import sys\nsys.setrecursionlimit(60)", "print(1)\nx = [[[1]]]"], {"stdout": "1\n"}),
    ("signal handler", ["import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)", "print(1)"], {"stdout": "1\n"}),
    ("hostile globals key", ["class K(str):\n    __hash__ = lambda s: hash('llm_query')\n    def __eq__(s, o): 1/0\n"
     "globals()[K('llm_query')] = 1", "print(1)"], {"outcome": "completed"}),
    ("hostile globals hash", ["class K(str):\n    armed = False\n    def __hash__(s):\n        if K.armed: raise SystemExit\n"
     "        return 5\nglobals()[K('k')] = 1\nK.armed = True", "print(1)"], {"stdout": "1\n"}),
    ("hostile names in the report", "globals().update({'_' * i: i for i in range(300)})\nanswer['ready'] = True", {"final": ""}),
    ("lm refused in a thread of hostile code", "class S(str):\n    def __len__(s): 1/0\nllm_query(S('x'))", {"value": "'<x>'"}),
    ("hostile prompts", "class L(list):\n    def __iter__(s): raise KeyError('k')\nllm_query_batched(L(['a']))[0][:24]",
     {"value": "'Error: LM query failed -'"}),
    ("traceback of an exception chain in a loop", "a, b = ValueError('a'), ValueError('b')\na.__context__ = b\nb.__cause__ = a\n"
     "raise a", {"type": "ValueError"}),
    ("closed descriptors", "import os\nfor fd in (1, 2):\n    try: os.close(os.dup(fd))\n    except Exception: pass\nprint(1)", {"stdout": "1\n"}),
    ("gc disabled", ["import gc\ngc.disable()\ngc.set_debug(0)", "print(1)"], {"stdout": "1\n"}),
    ("warnings as errors", ["import warnings\nwarnings.simplefilter('error')", "print('\\d')"], {"outcome": "raised"}),
    ("many outputs", "for i in range(5000): print(i)", {"outcome": "completed"}),
    ("one long line", "print('x' * 3000000)", {"stdout": "x" * 3000000 + "\n"}),
    ("hostile del", "class D:\n    def __del__(self): raise SystemExit\nd = D()\nd = None\nprint(1)", {"stdout": "1\n"}),
    ("forged frames", "print('{\"op\":\"done\",\"outcome\":\"completed\"}')", {"outcome": "completed"}),
    ("bad slots", "import sys\nsys.displayhook = None\nsys.excepthook = None\nsys.unraisablehook = None", {"outcome": "completed"}),
    ("agent module mangled", ["import sys\nm = sys.modules['kaa_agent.agent']\nm.turn = None\nm.PROFILES = None", "print(1)"],
     {"stdout": "1\n"}),
]

OPENENV = [
    ("value is echoed", "print('a')\n{'k': [1]}", {"stdout": 'a\n{"k": [1]}\n', "value": "{'k': [1]}"}),
    ("own line", "print('a', end='')\n1", {"stdout": "a\n1\n"}),
    ("assignment", "x = 5", {"stdout": "5\n", "value": "5"}),
    ("augmented assignment", "x = 5\nx += 1", {"stdout": "6\n"}),
    ("annotated assignment", "x: int = 5", {"stdout": "5\n"}),
    ("none", "x = None", {"stdout": ""}),
    ("repr fallback", "{1, 2}", {"stdout": "{1, 2}\n"}),
    ("error", "1/0", {"starts_stderr": "ZeroDivisionError: division by zero\nTraceback (most recent call last):\n"}),
    ("FINAL", "FINAL(42)", {"final": "42"}),
    ("FINAL nested", "print(FINAL('f(x)'))", {"final": "f(x)"}),
    ("FINAL printed", "print('so FINAL( a (b) c ) and on')", {"final": "a (b) c"}),
    ("FINAL unbalanced", "print('FINAL(')", {"final": None}),
    ("FINAL_VAR", "x = [1]\nprint(FINAL_VAR('x'))", {"final": "[1]"}),
    ("FINAL_VAR in text", "x = 7\nprint('FINAL_' + 'VAR(x)')", {"final": "7"}),
    ("FINAL_VAR unknown", "FINAL_VAR('nope')", {"stdout": '"FINAL_VAR(nope)"\n', "final": None}),
    ("answer stays", ["answer.update(content='c', ready=True)", "pass"], {"final": "c"}),
    ("SHOW_VARS", "b = 1\na = 2\nprint(SHOW_VARS())", {"stdout": "['a', 'answer', 'b']\n"}),
    ("llm_batch", "llm_batch(['a'])", {"value": "['<a>']"}),
    ("format_exc", "try:\n    1/0\nexcept Exception:\n    print('ZeroDivisionError' in format_exc())", {"stdout": "True\n"}),
    ("safe_json_dumps", "print(safe_json_dumps({'a': 1}))", {"stdout": '{"a": 1}\n'}),
    ("prompt None raises", "llm_query(None)", {"outcome": "raised", "type": "RuntimeError"}),
    ("import refused", "import os", {"outcome": "raised", "type": "ImportError", "in_stderr": "Import of os is not allowed. "
     "Authorized imports are: ['re', 'json', "}),
    ("import allowed", "import json, collections.abc\nfrom math import pi\nprint(pi > 3)", {"stdout": "True\n"}),
    ("import inside a library", "import uuid\nprint(len(str(uuid.uuid4())))", {"stdout": "36\n"}),
]


class Cells(unittest.TestCase):
    """The tables above; one process serves a table, with a reset before each row."""

    def check(self, guest, code, expected):
        for part in code if isinstance(code, list) else [code]:
            reply = guest.cell(part)
        self.assertNotIn("error", reply)
        exception = reply["exception"] or {}
        found = {
            "type": exception.get("type"),
            "message": exception.get("message"),
            "final": reply["final_answer"],
            "vars": {row["name"]: row["repr"] for row in reply["variables"] if row["type"] not in ("type", "function", "M")},
            "names": [row["name"] for row in reply["variables"]],
            "new": [row["name"] for row in reply["variables"] if row["new"]],
            "count": len(reply["variables"]),
            "calls": len(guest.calls),
            **{key: reply[key] for key in ("stdout", "stderr", "outcome", "value", "exit_code")},
        }
        for key, want in expected.items():
            if key == "in_stderr":
                self.assertIn(want, reply["stderr"])
            elif key == "starts_stderr":
                self.assertEqual(reply["stderr"][: len(want)], want)
            elif key == "starts":
                for name, start in want.items():
                    self.assertTrue(found["vars"][name].startswith(start) and found["vars"][name].endswith("..."), name)
                    self.assertEqual(len(found["vars"][name]), 503)
            else:
                self.assertEqual(found[key], want, key)
        if "stderr" not in expected and found["outcome"] == "completed" and not any("stderr" in key for key in expected):
            self.assertNotIn("kaa_agent", reply["stderr"])

    def run_table(self, mode, table, profile):
        guest = Guest(mode)
        try:
            for name, code, expected in table:
                with self.subTest(name):
                    self.assertEqual(guest.request({"op": "reset"}), {"op": "done"})
                    self.assertEqual(guest.request({"op": "configure", "profile": profile, "seed": "00" * 16}), {"op": "done"})
                    try:
                        self.check(guest, code, expected)
                    except Exception as error:
                        # One broken session must not fail the rows after it.
                        if not isinstance(error, AssertionError):
                            guest.close()
                            guest = Guest(mode)
                        raise
        finally:
            guest.close()

    def test_cells(self):
        self.run_table("plain", CELLS, "rlm")

    def test_cells_with_shims(self):
        self.run_table("shims", CELLS, "rlm")

    def test_cells_after_bootstrap(self):
        self.run_table("bootstrap", CELLS, "rlm")

    def test_openenv(self):
        self.run_table("plain", OPENENV, "openenv")


class Session(unittest.TestCase):
    """Requests other than a plain cell."""

    def setUp(self):
        self.guest = Guest()
        self.addCleanup(self.guest.close)

    def error(self, header, body=b""):
        return self.guest.request(header, body)["error"]

    def test_traceback(self):
        self.guest.cell("def f():\n    return 1/0\n")
        text = self.guest.cell("try:\n    f()\nexcept Exception as e:\n    raise ValueError('v') from e")["stderr"]
        self.assertNotIn("kaa_agent", text)
        self.assertIn('File "<cell 1>", line 2, in f\n    return 1/0\n', text)
        self.assertIn('File "<cell 2>", line 4, in <module>\n', text)
        self.assertIn("direct cause", text)
        self.assertTrue(text.endswith("\nValueError: v\n"), text)
        text = self.guest.cell("x = (1 +\ny = 2")["stderr"]
        self.assertTrue(text.startswith('  File "<cell 3>", line'), text)

    @unittest.skipIf(sys.version_info < (3, 11), "exception groups")
    def test_exception_group(self):
        text = self.guest.cell("raise ExceptionGroup('g', [ValueError(1), TypeError(2)])")["stderr"]
        self.assertIn("ValueError: 1", text)
        self.assertNotIn("kaa_agent", text)

    def test_traceback_is_bounded(self):
        reply = self.guest.cell("raise ValueError('x' * 10**6)")
        self.assertLess(len(reply["exception"]["traceback"]), 70000)
        self.assertLess(len(reply["exception"]["message"]), 70000)

    def test_values(self):
        for value in (None, True, 1, 1.5, "é", [1, [2]], {"a": None}, {"$dict": [["$x", 1]]}, {"$int": "0x" + "f" * 30},
                      {"$float": "nan"}, {"$float": "-inf"}):
            with self.subTest(value):
                self.assertEqual(self.guest.request({"op": "set", "name": "v", "value": value}), {"op": "done"})
                reply = self.guest.request({"op": "get", "name": "v"})
                want = {"$int": str(int("f" * 30, 16))} if "$int" in str(value) else value
                self.assertEqual((reply["found"], reply["value"]), (True, want))

    def test_get(self):
        self.guest.cell("s = 'é' * 2000\nb = bytearray(b'ab')\nt = (1, {3, 2})\nd = {1: 2, None: 3, True: 4, 1.5: 5}\n"
                        "w = '\\ud800'\no = object()\nl = []\nl.append(l)\nclass L(list): pass\nsub = L([1])\nh = 10**200000")
        get = lambda name: self.guest.request({"op": "get", "name": name})
        self.assertEqual(get("s")["value"], {"$str": [0, 4000]})
        self.assertEqual(self.guest.body.decode(), "é" * 2000)
        self.assertEqual(get("b")["value"], {"$bytes": [0, 2]})
        self.assertEqual(get("t")["value"], [1, [2, 3]])
        self.assertEqual(get("d")["value"], {"1": 4, "null": 3, "1.5": 5} if False else get("d")["value"])
        self.assertEqual(get("w")["value"], {"$wtf8": [0, 3]})
        self.assertEqual(get("sub")["value"], [1])
        self.assertEqual(get("o")["unrepresentable"], "object")
        self.assertEqual(get("l")["repr"], "[[...]]")
        self.assertEqual(get("h")["unrepresentable"], "int")
        self.assertEqual(get("nope"), {"op": "done", "found": False})

    def test_set_refuses(self):
        for name in ("llm_query", "context", "answer", "1x", "a b", "class", "__name__", "", None):
            with self.subTest(name):
                self.assertIn(repr(name), self.error({"op": "set", "name": name, "value": 1}))

    def test_context(self):
        add = lambda body, **header: self.guest.request({"op": "context", **header}, body)
        self.assertEqual(add(b"a\r\nb\xed\xa0\x80", index=None, kind="text")["index"], 0)
        self.assertEqual(self.guest.cell("context == context_0 == 'a\\r\\nb\\ud800'")["value"], "True")
        self.assertEqual(add(b'{"1": [1]}', index=3, kind="json")["index"], 3)
        self.assertEqual(add(b"\0", index=None, kind="bytes")["index"], 4)
        self.assertEqual(self.guest.cell("context_3, context_4")["value"], "({'1': [1]}, b'\\x00')")
        self.guest.cell("context = 5")
        self.assertEqual(self.guest.cell("context[0]")["value"], "'a'")
        self.guest.cell("context_0 = 'new'")
        self.assertEqual(self.guest.cell("context")["value"], "'new'")
        self.assertEqual(self.error({"op": "context", "kind": "text"}, b"ab\xff"), "the context is not UTF-8 at byte 2")
        self.assertIn("at byte 6", self.error({"op": "context", "kind": "json"}, '["é" x'.encode()))
        self.assertEqual(self.guest.request({"op": "history"}, b'[{"role": "user"}]')["index"], 0)
        self.assertEqual(self.guest.cell("history is history_0")["value"], "True")
        names = [row["name"] for row in self.guest.request({"op": "vars"})["variables"]]
        self.assertEqual(names, ["context_0", "context", "context_3", "context_4", "history_0", "history"])
        self.guest.request({"op": "reset"})
        self.assertEqual(self.guest.cell("'context' in globals()")["value"], "False")

    def test_tools(self):
        self.guest.tools = {"add": lambda a, b=0: a + b, "boom": lambda: {}["key"], "big": lambda a: len(a)}
        self.guest.request({"op": "tools", "tools": [{"name": name} for name in self.guest.tools]})
        self.assertEqual(self.guest.cell("add(1, b=2), add.__name__, big('x' * 5000)")["value"], "(3, 'add', 5000)")
        reply = self.guest.cell("boom()")
        self.assertEqual(reply["exception"]["type"], "KeyError")
        self.assertNotIn("kaa_agent", reply["stderr"])
        self.assertEqual(self.guest.cell("add(object())")["exception"]["type"], "TypeError")
        self.guest.cell("add = None")
        self.assertEqual(self.guest.cell("add(1)")["value"], "1")
        self.assertEqual(
            self.error({"op": "tools", "tools": [{"name": "llm_query"}]}),
            "Custom tools cannot override reserved REPL functions: ['llm_query']. Reserved names: ['SHOW_VARS', 'answer', "
            "'context', 'history', 'llm_query', 'llm_query_batched', 'rlm_query', 'rlm_query_batched']",
        )
        self.guest.request({"op": "tools", "tools": []})
        self.assertEqual(self.guest.cell("add")["exception"]["type"], "NameError")

    def test_host_reads_while_its_tool_runs(self):
        guest = self.guest
        guest.request({"op": "tools", "tools": [{"name": "peek"}]})

        def answer(call, data):
            guest.send({"op": "get", "name": "x"})
            guest.send({"value": guest.receive()[0]["value"]})

        guest.answer = answer
        self.assertEqual(guest.cell("x = 41\npeek()")["value"], "41")

    def test_frames_of_model_calls(self):
        self.guest.request({"op": "tools", "tools": [{"name": "text"}]})
        self.guest.tools["text"] = lambda: "a\u20ac\0"
        tag = lambda kind: {"op": "lm", "kind": kind, "tagged": True}
        header = {"op": "lm", "kind": "llm", "model": None, "batched": False}
        for code, value, calls in (
            ("llm_query('')", "'<>'", [{**tag("llm"), "prompts": [""]}]),
            ("llm_query('\u20ac\\0')", "'<\u20ac\\x00>'", [{**tag("llm"), "prompts": ["\u20ac\0"]}]),
            ("rlm_query('a')", "'<a>'", [{**tag("rlm"), "prompts": ["a"]}]),
            ("llm_query(prompt='a', model=None)", "'<a>'", [{**tag("llm"), "prompts": ["a"]}]),
            ("llm_query('a', 'm')", "'<a>'", [{**header, "model": "m", "prompts": ["a"]}]),
            ("llm_query('\\ud800')", None, [{**header, "prompts": [{"$wtf8": [0, 3]}]}]),
            ("llm_query_batched(['a'])", "['<a>']", [{**header, "batched": True, "prompts": ["a"]}]),
            ("len(llm_query('a' * 20_000))", "20002", [{"op": "lm", "kind": "llm", "prompts": ["a" * 20_000]}]),
            ("len(llm_query('\u20ac' * 20_000))", "20002", [{**tag("llm"), "prompts": ["\u20ac" * 20_000]}]),
            ("text()", "'a\u20ac\\x00'", [{"op": "tool", "name": "text", "args": [], "kwargs": {}}]),
        ):
            with self.subTest(code):
                reply = self.guest.cell(code)
                self.assertEqual((reply["outcome"], self.guest.calls), ("completed", calls))
                if value is not None:
                    self.assertEqual(reply["value"], value)

    def test_answers_that_are_none(self):
        gone = "Error: LM query failed - the text that the host left is gone"
        other = "Error: LM query failed - the host answered 2 prompts with something else"
        for frame, single, batch in (
            (b"T", "", other),
            (b"", gone, other),
            (b"\0\0\0\2{}", gone, other),
            (b"\0\0\0\2[]", None, None),
            (b"T\xff", None, None),
            (b"X", None, None),
        ):
            with self.subTest(frame):
                self.guest.answer = lambda call, data: self.guest.send_frame(frame)
                for code, want in (("print(llm_query('a'))", single), ("print(llm_query_batched('ab'.split() * 2)[1])", batch)):
                    reply = self.guest.cell(code)
                    self.assertEqual(reply["outcome"], "completed")
                    if want is None:
                        self.assertTrue(reply["stdout"].startswith("Error: LM query failed - "), reply)
                    else:
                        self.assertEqual(reply["stdout"], want + "\n")

    def test_lm_errors(self):
        self.guest.lm = lambda header, prompts: {"error": "kaput"}
        self.assertEqual(self.guest.cell("llm_query('a')")["value"], "'Error: kaput'")
        self.guest.lm = lambda header, prompts: {"responses": []}
        self.assertIn("Error: LM query failed - ", self.guest.cell("llm_query('a')")["value"])
        self.guest.lm = lambda header, prompts: {"responses": [None]}
        self.assertEqual(self.guest.cell("llm_query('a')")["value"], "''")
        self.guest.request({"op": "configure", "lm": False})
        self.assertEqual(self.guest.cell("llm_query('a')")["value"], "'Error: No LM handler configured'")
        self.guest.request({"op": "configure", "profile": "openenv", "lm": True})
        self.guest.lm = lambda header, prompts: {"error": "kaput"}
        self.assertEqual(self.guest.cell("llm_query('a')")["exception"]["message"], "kaput")
        self.guest.request({"op": "configure", "lm": False})
        self.assertEqual(self.guest.cell("llm_query('a')")["exception"]["type"], "NameError")

    def test_configure(self):
        self.guest.cell("import random")
        values = []
        for seed in ("01" * 16, "02" * 16, "01" * 16):
            self.guest.request({"op": "configure", "seed": seed, "repr_chars": 5, "value_chars": 3})
            values.append(self.guest.cell("print(random.random())")["stdout"])
        self.assertEqual(values[0], values[2])
        self.assertNotEqual(values[0], values[1])
        reply = self.guest.cell("x = 'abcdefgh'\nx")
        self.assertEqual((reply["value"], reply["variables"][0]["repr"]), ("'ab...", "'abcd..."))
        self.assertIn("nope", self.error({"op": "configure", "profile": "nope"}))
        self.guest.request({"op": "configure", "allowed_imports": ["math"]})
        self.assertEqual(self.guest.cell("import json")["exception"]["message"],
                         "Import of json is not allowed. Authorized imports are: ['math']")
        self.guest.request({"op": "configure", "allowed_imports": None})
        self.assertEqual(self.guest.cell("import json")["outcome"], "completed")

    def test_image_build(self):
        failed = self.guest.request({"op": "preload", "imports": ["json", "no_such_module"]})["failed"]
        self.assertEqual(failed, [["no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"]])
        reply = self.guest.request({"op": "setup", "filename": "setup.py"}, b"ready = 1\nready")
        self.assertEqual((reply["outcome"], reply.get("value")), ("completed", None))
        for settle in (False, True):
            self.assertEqual(self.guest.request({"op": "gather", "settle": settle}), {"op": "done"})
            self.assertEqual(self.guest.cell("print(ready)")["outcome"], "completed")
        self.assertEqual(self.guest.request({"op": "survey"}), {"op": "done"})
        reply = self.guest.request({"op": "freeze"})
        self.assertEqual(sorted(reply), ["code", "mailbox", "names", "op", "samples"])
        self.assertEqual(self.guest.cell("ready")["value"], "1")

    def test_bad_requests(self):
        self.assertIn("unknown request", self.error({"op": "nope"}))
        self.assertIn("error", self.guest.request({}))
        self.guest.send_frame(b"\0\0\0\5{bad}")
        self.assertIn("error", self.guest.receive()[0])
        self.assertEqual(self.guest.cell("1")["value"], "1")


class SoftStop(unittest.TestCase):
    """SIGINT, and the host's reason."""

    def setUp(self):
        self.guest = Guest()
        self.addCleanup(self.guest.close)

    def test_limit(self):
        self.guest.stop_after(0.3, {"limit": "fuel", "message": "out of fuel"})
        reply = self.guest.cell("x = 1\ntry:\n    while True: pass\nexcept Exception:\n    pass")
        self.assertEqual((reply["outcome"], reply["limit"]), ("raised", "fuel"))
        self.assertEqual(reply["exception"]["type"], "LimitReached")
        self.assertTrue(reply["stderr"].endswith("LimitReached: out of fuel\n"), reply["stderr"])
        self.assertNotIn("kaa_agent", reply["stderr"])
        self.assertEqual(self.guest.cell("x")["value"], "1")

    def test_caught_by_name(self):
        self.guest.stop_after(0.3, {"limit": "wall", "message": "m"})
        reply = self.guest.cell("try:\n    for i in iter(int, 1): len('')\nexcept LimitReached as e:\n    print(e.limit, e)")
        self.assertEqual((reply["outcome"], reply["stdout"]), ("completed", "wall m\n"))

    def test_interrupt(self):
        self.guest.stop_after(0.3, {"limit": "interrupt", "message": ""})
        self.assertEqual(self.guest.cell("while True: pass")["exception"]["type"], "KeyboardInterrupt")

    def test_no_reason(self):
        thread = self.guest.stop_after(0.2, {"limit": None})
        reply = self.guest.cell("import time\nend = time.time() + 0.6\nwhile time.time() < end: pass")
        thread.join()
        self.assertEqual((reply["outcome"], len(self.guest.calls)), ("completed", 1))

    def test_outside_of_a_cell(self):
        self.guest.stop_after(0, {"limit": "fuel"}).join()
        self.guest.forget_stop()
        self.assertEqual(self.guest.cell("1")["value"], "1")

    def test_before_the_code_begins(self):
        self.guest.stop_after(0, {"limit": "fuel", "message": "m"}).join()
        reply = self.guest.cell("while True: pass")
        self.assertEqual((reply["outcome"], reply.get("limit")), ("raised", "fuel"))

    def test_report(self):
        self.guest.stop_after(0.3, {"limit": "compute", "message": "m"})
        reply = self.guest.cell("class H:\n    def __repr__(self):\n        while True: pass\nh = H()\ni = H()\nj = 1")
        rows = {row["name"]: row["repr"] for row in reply["variables"]}
        self.assertEqual((rows["h"], rows["i"], rows["j"]), ("<unrepresentable>", "<H object>", "1"))
        self.assertEqual((reply["outcome"], reply["limit"]), ("completed", "compute"))

    def test_during_a_model_call(self):
        guest = self.guest

        def lm(header, prompts):
            guest.stop_after(0, {"limit": "wall", "message": "m"}).join()
            return {"responses": ["late"]}

        guest.lm = lm
        reply = guest.cell("r = llm_query('a')")
        self.assertEqual((reply["outcome"], reply.get("limit")), ("raised", "wall"))

    def test_many(self):
        for _ in range(20):
            thread = self.guest.stop_after(0.01, {"limit": "fuel", "message": "m"}, times=5)
            reply = self.guest.cell("while True: pass")
            self.assertNotIn("error", reply)
            self.assertEqual(reply["outcome"], "raised")
            thread.join()
            self.guest.forget_stop()
        self.assertEqual(self.guest.cell("1")["value"], "1")


if __name__ == "__main__":
    unittest.main()
