# /// case
# title = "Exceptions and values that fight back are reported all the same"
# contract = ["results"]
# ///

# %%
class Mute(Exception):
    def __str__(self):
        raise RuntimeError("I will not be shown")
    __repr__ = __str__

raise Mute()
#: exception = "Mute: <exception str() failed>"
#: stderr_contains = ["Mute: <exception str() failed>"]

# %%
Mute()
#: value = "<unrepresentable>"

# %%
class Odd(Exception):
    __module__ = property(lambda self: 1 / 0)
    def __str__(self):
        return 7

raise Odd()
#: exception_type_contains = "Odd"

# %%
class Quitter:
    def __repr__(self):
        raise SystemExit(9)

Quitter()
#: value = "<unrepresentable>"

# %%
class Stranger(BaseException):
    def __getattribute__(self, name):
        raise SystemExit(3)

raise Stranger("x")
#: exception_type = "Stranger"

# %%
print("still here")
#: stdout = "still here\n"
