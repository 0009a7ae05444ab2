"""Runs cells as CPython's own prompt would: one after the other, in one `__main__`.

The cells are a list of texts, as JSON on stdin; what each of them gave is a line of JSON on stdout. Descriptors 1 and 2
are files while a cell runs, so that what is written to them directly is caught, too.
"""

import ast
import json
import linecache
import os
import sys
import tempfile
import traceback
import types

cells = json.load(sys.stdin)
reports = os.fdopen(os.dup(1), "w")
directory = tempfile.TemporaryDirectory()
os.chdir(directory.name)
null = os.open(os.devnull, os.O_RDONLY)
os.dup2(null, 0)
sys.stdin = open(0, closefd=False)
for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(encoding="utf-8", errors="backslashreplace", write_through=True, newline="\n")
own = sys.modules["__main__"]  # Kept: it is what runs here.
module = sys.modules["__main__"] = types.ModuleType("__main__")
names = module.__dict__


def run(code, filename):
    """The value of the last expression, as a cell's value is."""
    compile(code, filename, "exec")  # Nothing of a cell runs when some of it can't be compiled.
    tree = ast.parse(code, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, filename, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), filename, "eval"), names)


def text_of(error):
    try:
        return str(error)
    except BaseException:
        return "<exception str() failed>"


def attempt(code, filename):
    """How a cell ended, but for its output."""
    linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)
    try:
        value = run(code, filename)
    except SystemExit as error:
        status = 0 if error.code is None else int(error.code) if isinstance(error.code, int) else 1
        return {"outcome": "exited", "exit_code": status}
    except BaseException as error:
        entry = error.__traceback__
        while entry is not None and entry.tb_frame.f_code.co_filename in ("<string>", ast.__file__):
            entry = entry.tb_next
        error.__traceback__ = entry
        kind, message = type(error).__name__, text_of(error)
        lines = traceback.TracebackException(type(error), error, entry).format()
        return {
            "outcome": "raised",
            "exception": kind + ": " + message if message else kind,
            "exception_type": kind,
            "traceback": "".join(lines),
        }
    return {"outcome": "completed", "exception": None, "value": None if value is None else repr(value)}


for number, code in enumerate(cells, 1):
    streams = {}
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        streams[name] = tempfile.TemporaryFile()
        os.dup2(streams[name].fileno(), descriptor)
    report = attempt(code, "<cell %d>" % number)
    for name, stream in streams.items():
        stream.seek(0)
        written = stream.read()
        stream.close()
        report[name] = written.decode("utf-8", "replace")
        report[name + "_bytes"] = len(written)
    if report["outcome"] != "completed":
        del report["stderr"], report["stderr_bytes"]
    reports.write(json.dumps(report) + "\n")
    reports.flush()
