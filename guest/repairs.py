"""What a cell can break in the interpreter without meaning to, and how it is put back after the cell.

All of it is looked at after every cell, so the checks are comparisons of identity and touch little memory.
"""

import _signal
import builtins
import sys

_modules = sys.modules
_gettrace, _settrace, _getprofile, _setprofile = sys.gettrace, sys.settrace, sys.getprofile, sys.setprofile
_getrecursionlimit, _setrecursionlimit = sys.getrecursionlimit, sys.setrecursionlimit
# From the C module: `signal` wraps every answer in an enum.
_getsignal, _setsignal, _SIGINT = _signal.getsignal, _signal.signal, int(_signal.SIGINT)
_displayhook, _excepthook, _unraisablehook = sys.__displayhook__, sys.__excepthook__, sys.__unraisablehook__
_names = builtins.__dict__
RECURSION_MIN = 200  # The agent itself needs some.


class Repairs:
    """The state of the interpreter that belongs to the agent."""

    def __init__(self, module, streams, handler):
        self.module, self.streams, self.handler = module, streams, handler
        self.builtins, self.values, self.modules = {}, [], {}
        self.descriptors = None  # Where the guest is a process: those that a cell may have closed.
        _setsignal(_SIGINT, handler)
        self.remember()

    def remember(self):
        """Takes the builtins as they are now for the right ones."""
        self.builtins = dict(_names)
        if "sys" in _modules:
            self.modules = dict(_modules)  # For a cell that clears `sys.modules`.
        self.values = [*_names.values()]

    def stop_tracing(self):
        """First of all, or the rest of the agent runs under the cell's tracer."""
        if _gettrace() is not None:
            _settrace(None)
        if _getprofile() is not None:
            _setprofile(None)

    def restore(self):
        if self.descriptors is not None:
            self.descriptors.restore()
        try:
            # Identical objects are equal without more ado; an `__eq__` can run only where something was replaced.
            same = [*_names.values()] == self.values
        except BaseException:
            same = False
        if not same:
            self.restore_builtins()
        self.streams.restore()
        if _modules.get("__main__") is not self.module:
            _modules["__main__"] = self.module
        known = sys.__dict__
        if known.get("modules") is not _modules:
            sys.modules = _modules
        if "sys" not in _modules:
            _modules.update(self.modules)
        if known.get("displayhook") is not _displayhook:
            sys.displayhook = _displayhook  # The export `turn` calls it.
        if known.get("excepthook") is not _excepthook:
            sys.excepthook = _excepthook
        if known.get("unraisablehook") is not _unraisablehook:
            sys.unraisablehook = _unraisablehook
        if _getsignal(_SIGINT) is not self.handler:
            _setsignal(_SIGINT, self.handler)
        if _getrecursionlimit() < RECURSION_MIN:
            _setrecursionlimit(1000)

    def restore_builtins(self):
        """Puts back what was replaced or deleted; what the cell added stays, as in any Python."""
        for name, value in self.builtins.items():
            if _names.get(name) is not value:
                _names[name] = value
        self.remember()
