# /// case
# title = "The language is all there: matching, unpacking, with, star expressions, annotations, f-strings"
# plain = true
# ///

# %%
def kind(value):
    match value:
        case {"type": "point", "at": [x, y]}:
            return f"point {x},{y}"
        case [first, *rest] if rest:
            return f"list of {first} and {len(rest)}"
        case str() | bytes():
            return "text"
        case _:
            return "other"

print(kind({"type": "point", "at": [1, 2]}), kind([1, 2, 3]), kind(""), kind([1]))
first, *middle, last = range(5)
print(first, middle, last, {**{"a": 1}, "b": 2}, [*"ab", *"c"])
value = 3.14159
print(f"{value:.2f} {value!r:>10} {'nested' + str(1)} {value=:.1f}")
#: stdout = """
#: point 1,2 list of 1 and 2 text other
#: 0 [1, 2, 3] 4 {'a': 1, 'b': 2} ['a', 'b', 'c']
#: 3.14    3.14159 nested1 value=3.1
#: """

# %%
import contextlib

@contextlib.contextmanager
def tagged(name):
    print(f"<{name}>")
    try:
        yield name
    finally:
        print(f"</{name}>")

with tagged("a") as a, tagged("b") as b:
    print(a + b)
#: stdout = "<a>\n<b>\nab\n</b>\n</a>\n"

# %%
try:
    raise ExceptionGroup("g", [ValueError(1), TypeError(2), ValueError(3)])
except* ValueError as values:
    print("values", len(values.exceptions))
except* TypeError as types:
    print("types", len(types.exceptions))
for n in range(3):
    if n == 7:
        break
else:
    print("else")
#: stdout = "values 2\ntypes 1\nelse\n"
