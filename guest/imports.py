"""An allow-list of imports, for profiles that promise one.

This is guidance for the model ("use what is there"), not a wall: a cell can get at any module through one that is
allowed. The wall is the sandbox. Only `import` statements in the cells' own namespace are looked at, so that an allowed
library may import whatever it needs.
"""

import builtins


class ImportGuard:
    """Wraps `builtins.__import__` for the frames whose globals are the namespace of the cells."""

    def __init__(self, namespace):
        self.namespace = namespace
        self.original = builtins.__import__
        self.allowed = None

    def allow(self, names):
        """Allows only `names` and what is inside them; None allows everything again."""
        self.allowed = None if names is None else [*names]
        if self.allowed is None:
            builtins.__import__ = self.original
            return
        original, namespace, refusal = self.original, self.namespace, self.refusal

        def __import__(name, globals=None, locals=None, fromlist=(), level=0):
            if globals is namespace and level == 0:
                text = refusal(name)
                if text is not None:
                    raise ImportError(text, name=name)
            return original(name, globals, locals, fromlist, level)

        builtins.__import__ = __import__

    def refusal(self, name):
        """Why `name` must not be imported, in smolagents' words."""
        for entry in self.allowed:
            base = entry[:-2] if entry.endswith(".*") else entry
            if entry == "*" or name == base or name.startswith(base + "."):
                return None
        return "Import of %s is not allowed. Authorized imports are: %s" % (name, self.allowed)
