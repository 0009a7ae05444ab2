"""Cells as code: compiling one, what it stored, and tracebacks that show only its frames."""

import _ast
import collections
import linecache
import opcode
from traceback import TracebackException

from .values import type_name

VALUE = "__kaa_value__"  # Holds the value of the last statement from its evaluation to the end of the cell.
SOURCES_MAX = 50
SOURCE_CHARS_MAX = 1_000_000
# Frames that a traceback shows, from the cell's own on: looking at a million takes longer than making them.
FRAMES_MAX = 2000
TRACEBACK_CHARS_MAX = 64 * 1024
_ONLY_AST = 0x400  # ast.PyCF_ONLY_AST; importing `ast` costs more than a first cell.
_STORES = tuple(opcode.opmap[name] for name in ("STORE_NAME", "STORE_GLOBAL") if name in opcode.opmap)
_EXTENDED_ARG = opcode.opmap["EXTENDED_ARG"]
_compile, _len, _str, _set, _type, _isinstance = compile, len, str, set, type, isinstance
_Expr, _Assign, _AugAssign, _AnnAssign, _Name = _ast.Expr, _ast.Assign, _ast.AugAssign, _ast.AnnAssign, _ast.Name
_STATEMENTS = frozenset("import from def class for while if with try return assert raise del async".split())
_load, _store = _ast.Load(), _ast.Store()
_cache = linecache.cache
_format, _checkcache = TracebackException.format, linecache.checkcache
_OWN = ("<kaa>/", __file__.rpartition("/")[0] + "/")  # Where this package's frames say they are from.


class Sources:
    """The source of the last cells, for tracebacks and `inspect.getsource`."""

    def __init__(self):
        self.kept = collections.deque()

    def add(self, filename, text):
        if _len(text) > SOURCE_CHARS_MAX:
            return
        entry = (_len(text), None, text.splitlines(True), filename)
        self.kept.append((filename, entry))
        _cache[filename] = entry
        if _len(self.kept) > SOURCES_MAX:
            _cache.pop(self.kept.popleft()[0], None)

    def restore(self):
        """Before a traceback: a cell may have cleared linecache."""
        if linecache.cache is not _cache:
            linecache.cache = _cache
        for filename, entry in self.kept:
            _cache[filename] = entry

    def clear(self):
        self.kept.clear()


def compile_cell(source, filename, sources, assignments):
    """The code of a cell, and whether the whole cell is one expression, to be evaluated.

    Other cells leave the value of their last expression in `VALUE`; with `assignments` the value of a last assignment
    counts too. Raises what CPython raises for such a source.
    """
    try:
        text = _str(source, "utf-8")
    except UnicodeDecodeError:
        # Raises the SyntaxError of a file in a wrong encoding; or honours a declaration of its encoding.
        return _compile(source, filename, "exec", 0, True), False
    if text[:1] == "\ufeff":
        text = text[1:]
    sources.add(filename, text)
    if _may_be_expression(text):
        try:
            return _compile(text, filename, "eval", 0, True), True
        except (SyntaxError, ValueError):
            pass  # A statement, or an error that the next line reports.
    if not assignments and _is_assignment(text):
        return _compile(text, filename, "exec", 0, True), False
    tree = _compile(text, filename, "exec", _ONLY_AST, True)
    body = tree.body
    if body:
        _capture(body, body[-1], assignments)
    return _compile(tree, filename, "exec", 0, True), False


def _may_be_expression(text):
    """A guess that saves short cells, like `print(x)`, the way through Python's own syntax tree."""
    line = text.rstrip()
    if "\n" in line or text[:1].isspace() or text.partition(" ")[0] in _STATEMENTS:
        return False
    return line[-1:] in (")", "]") or "=" not in line


def _is_assignment(text):
    """Whether a cell is one line, `name = value`: then there is nothing to capture, and it too is saved that way."""
    line = text.rstrip()
    name, _, value = line.partition("=")
    return name.strip().isidentifier() and value[:1] != "=" and not ("\n" in line or "\r" in line or ";" in line)


def _capture(body, last, assignments):
    """Makes the last statement store its value; its position in the source stays."""
    kind = _type(last)
    place = {
        "lineno": last.lineno,
        "col_offset": last.col_offset,
        "end_lineno": last.end_lineno,
        "end_col_offset": last.end_col_offset,
    }
    if kind is _Expr:
        body[-1] = _Assign(targets=[_Name(VALUE, _store, **place)], value=last.value, type_comment=None, **place)
    elif not assignments:
        return
    elif kind is _Assign:
        last.targets.append(_Name(VALUE, _store, **place))
    elif (kind is _AugAssign or (kind is _AnnAssign and last.value is not None)) and _type(last.target) is _Name:
        read = _Name(last.target.id, _load, **place)
        body.append(_Assign(targets=[_Name(VALUE, _store, **place)], value=read, type_comment=None, **place))


def stored_names(code):
    """The names that a cell's own statements bind.

    Comparing objects before and after would miss a name whose new value took the place of its old one in memory, and
    keeping the old values alive for the comparison would double the memory of a cell that replaces large data.
    """
    ops, names = code.co_code, code.co_names
    count, found = _len(names), _set()
    for store in _STORES:
        at = ops.find(store)
        while at >= 0:
            if not at & 1:
                index = ops[at + 1]
                if at >= 2 and ops[at - 2] == _EXTENDED_ARG:
                    index |= ops[at - 1] << 8
                if index < count:
                    found.add(names[index])
            at = ops.find(store, at + 1)
    return found


def format_exception(error, sources):
    """The traceback as CPython prints it, without the agent's frames, bounded. May run code of the cell."""
    sources.restore()
    formatted = TracebackException(type(error), error, error.__traceback__, limit=FRAMES_MAX)
    _strip(formatted, _set())
    text = "".join(_format(formatted))
    return cut_middle(text, TRACEBACK_CHARS_MAX)


def cut_middle(text, limit):
    """Both ends of a text that is too long."""
    if _len(text) <= limit:
        return text
    half = limit // 2
    return "%s\n... (%d characters left out)\n%s" % (text[:half], _len(text) - 2 * half, text[-half:])


def _strip(formatted, seen):
    """Takes the agent's frames out of a formatted exception and of everything chained to it."""
    while formatted is not None and id(formatted) not in seen:
        seen.add(id(formatted))
        stack = formatted.stack
        if stack is not None:
            stack[:] = [frame for frame in stack if not frame.filename.startswith(_OWN)]
            if not stack:
                _no_stack(formatted)
        for other in getattr(formatted, "exceptions", None) or ():
            _strip(other, seen)
        _strip(formatted.__cause__, seen)
        formatted = formatted.__context__


def _no_stack(formatted):
    """A SyntaxError of the cell has no frames: no "Traceback" line either, like CPython's for a file."""
    if hasattr(formatted, "exc_traceback"):  # Before 3.10 this decides, and the empty stack must stay.
        formatted.exc_traceback = None
    if hasattr(formatted, "_ctx") or not hasattr(formatted, "exc_traceback"):
        formatted.stack = None


def plain_traceback(error, message):
    """A traceback without the help of `traceback` or of the exception: for those that fight back."""
    lines, entry = [], BaseException.__traceback__.__get__(error)
    while entry is not None and _len(lines) < 100:
        code = entry.tb_frame.f_code
        if not code.co_filename.startswith(_OWN):
            lines.append('  File "%s", line %s, in %s\n' % (code.co_filename, entry.tb_lineno, code.co_name))
        entry = entry.tb_next
    head = "Traceback (most recent call last):\n" + "".join(lines) if lines else ""
    return cut_middle("%s%s: %s\n" % (head, type_name(error), message), TRACEBACK_CHARS_MAX)
