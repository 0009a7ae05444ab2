# /// case
# title = "What cells made is read as the nearest value: tuples and sets as lists, keys as JSON has them"
# ///

# %%
import collections, enum
t = (1, {2}, frozenset([3]))
b = [bytearray(b"a"), memoryview(b"b")]
n = {1: "a", None: "b", True: "c", 2.5: "d"}
class Text(str): pass
class Level(enum.IntEnum):
    HIGH = 3
s = [Text("sub"), Level.HIGH, collections.OrderedDict(a=1), collections.namedtuple("P", "x")(7)]
x = 2**64
f = open
loop = []
loop.append(loop)

# %% get t
#: value = [1, [2], [3]]

# %% get b
#: value = [{ "$bytes" = "61" }, { "$bytes" = "62" }]

# %% get n
#: value = { "1" = "c", null = "b", "2.5" = "d" }

# %% get s
#: value = ["sub", 3, { a = 1 }, [7]]

# %% get x
#: value = { "$int" = "18446744073709551616" }

# %% get missing
#: found = false

# %% get f
#: error_kind = "Invalid"
#: error_contains = ["`f`", "built-in function open"]

# %% get loop
#: error_kind = "Invalid"
#: error_contains = "`loop`"

# %%
class Sly:
    def __repr__(self):
        raise SystemExit(1)
sly = Sly()

# %% get sly
#: error_kind = "Invalid"
#: error_contains = "`sly`"
