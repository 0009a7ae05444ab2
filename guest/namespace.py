"""The user namespace: `__main__`'s dict, its reserved names, contexts, and the report of what a cell changed."""

import builtins

from .values import UNREPRESENTABLE, short_name, short_repr, type_name

RESERVED = (
    "SHOW_VARS",
    "answer",
    "context",
    "history",
    "llm_query",
    "llm_query_batched",
    "rlm_query",
    "rlm_query_batched",
)
REPORT_MAX = 200
LIST_MAX = 1000
_MISSING = object()
_len, _type, _str, _dict, _issubclass, _id, _map, _zip = len, type, str, dict, issubclass, id, map, zip
_SIZED = frozenset((list, dict, set, bytearray))
_no_sized = _SIZED.isdisjoint
_update, _setitem = dict.update, dict.__setitem__


class Answer(dict):
    """The final answer: set `answer["content"]`, then `answer["ready"] = True`."""

    __slots__ = ("touched",)

    def __init__(self, *args, **kwargs):
        dict.__init__(self, *args, **kwargs)
        self.touched = False

    def __setitem__(self, key, value):
        _setitem(self, key, value)
        if key == "ready":
            self.touched = True

    def update(self, *args, **kwargs):
        new = _dict(*args, **kwargs)
        _update(self, new)
        if "ready" in new:
            self.touched = True

    def __ior__(self, other):
        self.update(other)
        return self

    def setdefault(self, key, default=None):
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self):
        return (_dict, (_dict(self),))  # A pickle of it must load where there is no agent.


class Namespace:
    """Everything the agent knows about `__main__`."""

    def __init__(self, module):
        self.module, self.names = module, module.__dict__
        self.fixed = {}  # Reserved functions and host tools: put back after every cell.
        self.tools = {}
        self.counts = {"context": 0, "history": 0}
        self.first = {}  # What the aliases `context` and `history` mean.
        self.answer = Answer(content="", ready=False)
        self.was_ready = False
        self.keys, self.ids, self.sizes = [], [], []  # As they were before the cell.

    def reset(self):
        """A namespace as a fresh interpreter has it, with the globals of the profile."""
        self.names.clear()
        self.names.update(
            __name__="__main__", __doc__=None, __package__=None, __loader__=None, __spec__=None, __builtins__=builtins
        )
        self.counts = {"context": 0, "history": 0}
        self.first = {}
        self.answer = Answer(content="", ready=False)
        self.names.update(self.fixed, answer=self.answer)

    def define(self, functions):
        """Replaces the reserved functions."""
        for name in self.fixed:
            self.names.pop(name, None)
        self.fixed = {**functions, **self.tools}
        self.names.update(self.fixed)
        self.names["answer"] = self.answer

    def set_tools(self, tools):
        conflicts = sorted(name for name in tools if name in RESERVED)
        if conflicts:
            raise ValueError(
                "Custom tools cannot override reserved REPL functions: %s. Reserved names: %s"
                % (conflicts, sorted(RESERVED))
            )
        for name in self.tools:
            del self.fixed[name]
            self.names.pop(name, None)
        self.tools = tools
        self.fixed.update(tools)
        self.names.update(tools)

    def add(self, kind, index, value):
        """Adds a context or a history and returns its index."""
        index = self.counts[kind] if index is None else index
        if _type(index) is not int or index < 0:
            raise ValueError("the index of a %s must be a whole number, not %r" % (kind, index))
        self.counts[kind] = max(self.counts[kind], index + 1)
        self.names["%s_%d" % (kind, index)] = value
        if index == 0:
            self.first[kind] = self.names[kind] = value
        return index

    def is_reserved(self, name):
        return name in self.fixed or name in RESERVED or name.startswith("__kaa_")

    # --- around a cell ---

    def begin(self):
        """Remembers what there is, by identity: values must not be kept alive for this."""
        names = self.names
        self.keys, self.ids = [*names], [*_map(_id, names.values())]
        if _no_sized(_map(_type, names.values())):
            self.sizes = []
        else:
            self.sizes = [(name, _len(value)) for name, value in names.items() if _type(value) in _SIZED]
        self.answer.touched = False
        self.was_ready = _is_true(_dict.get(self.answer, "ready"))

    def unchanged(self):
        """Whether every name means what it did before the cell: what is reserved is in its place then."""
        names = self.names
        try:
            return self.ids == [*_map(_id, names.values())] and self.keys == [*names]
        except BaseException:
            return False  # A key with an `__eq__` that raises.

    def changed(self, stored):
        """The names that the cell created or changed, in the order of the namespace, with "is it new"."""
        before = {name: value for name, value in _zip(self.keys, self.ids) if _type(name) is _str}
        names, found = self.names, []
        grown = {name for name, size in self.sizes if _size(names.get(name)) != size}
        for name, value in [*names.items()]:
            if _type(name) is not _str:
                continue
            old = before.get(name)
            if old == _id(value) and name not in stored and name not in grown:
                continue
            if name[:1] != "_" and name not in self.fixed and not self.is_given(name, value):
                found.append((name, value, old is None))
        return found

    def is_given(self, name, value):
        """Whether it is `answer`, or an alias of a context or history."""
        return name == "answer" or (name in self.first and self.first[name] is value)

    def forget(self):
        """The cell is over."""
        self.keys = self.ids = self.sizes = ()

    def restore(self):
        """Puts the reserved names back; returns whether the cell submitted `answer`."""
        names = self.names
        for name, value in self.fixed.items():
            if names.get(name, _MISSING) is not value:
                names[name] = value
        if names.get("__builtins__") is not builtins:
            names["__builtins__"] = builtins
        if names.get("__name__") != "__main__":
            names["__name__"] = "__main__"
        for kind, value in self.first.items():
            current = names.setdefault(kind + "_0", value)
            if current is not value:
                self.first[kind] = current
            names[kind] = current
        return self.restore_answer()

    def restore_answer(self):
        """Puts `answer` back; returns whether the cell submitted it."""
        answer, current = self.answer, self.names.get("answer", _MISSING)
        if current is not answer:
            if current is _MISSING:
                self.names["answer"] = answer
            elif _issubclass(_type(current), _dict):
                answer = Answer(_dict.items(current))
                answer.touched = True
            else:
                answer = Answer(content="", ready=False)
            self.answer = self.names["answer"] = answer
        ready = _is_true(_dict.get(answer, "ready"))
        return ready and (answer.touched or not self.was_ready)

    # --- what the model asks for ---

    def variables(self):
        """The variables as SHOW_VARS lists them."""
        return {
            name: value
            for name, value in [*self.names.items()]
            if _type(name) is _str and name[:1] != "_" and name != "answer" and name not in self.fixed
        }

    def show_vars(self):
        found = self.variables()
        if not found:
            return "No variables created yet. Use ```repl``` blocks to create variables."
        return "Available variables: %s" % {name: type_name(value) for name, value in found.items()}

    def final_var(self, name):
        if not _issubclass(_type(name), _str):
            return _str(name)
        given, name, found = name, name.strip().strip("\"'"), self.variables()
        if name in found:
            return _str(found[name])
        if any(given is value or (_type(value) is _str and given == value) for value in found.values()):
            return _str(given)  # `FINAL_VAR(summary)` for `FINAL_VAR("summary")`: RLM's own documentation writes so.
        if not found:
            return (
                "Error: Variable '%s' not found. No variables have been created yet. "
                "You must create and assign a variable in a REPL block BEFORE calling FINAL_VAR on it." % name
            )
        return (
            "Error: Variable '%s' not found. Available variables: %s. "
            "You must create and assign a variable BEFORE calling FINAL_VAR on it." % (name, [*found])
        )


def _is_true(value):
    """Truth without the right to raise."""
    if value is True or value is False:
        return value
    try:
        return True if value else False
    except Exception:
        return False


def _size(value):
    return _len(value) if _type(value) in _SIZED else -1


def describe(name, value, chars, user_code):
    """One row of a report about variables. With `user_code` it may run a `__repr__` of the cell."""
    try:
        text = short_repr(value, chars, user_code)
    except Exception:
        text = UNREPRESENTABLE
    return {"name": short_name(name), "type": type_name(value), "repr": text}
