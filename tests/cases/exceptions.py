# /// case
# title = "An exception is a result with its type, its message and a traceback of the cell's own frames"
# contract = ["results"]
# plain = true
# ///

# %%
def divide(a, b):
    return a / b

def outer():
    divide(1, 0)

outer()
#: exception = "ZeroDivisionError: division by zero"
#: exception_type = "ZeroDivisionError"
#: traceback_starts = '''
#: Traceback (most recent call last):
#:   File "<cell 1>", line 7, in <module>
#:     outer()
#: '''
#: traceback_contains = ['File "<cell 1>", line 5, in outer', 'File "<cell 1>", line 2, in divide']
#: traceback_ends = "ZeroDivisionError: division by zero\n"
#: traceback_lacks = ["kaa", "agent"]

# %%
outer()
#: exception = "ZeroDivisionError: division by zero"
#: traceback_contains = ['File "<cell 2>", line 1, in <module>', 'File "<cell 1>", line 5, in outer']

# %%
class Trouble(Exception):
    pass

raise Trouble("many", 2)
#: exception = "Trouble: ('many', 2)"
#: traceback_ends = "Trouble: ('many', 2)\n"

# %%
import json
json.loads("{")
#: exception_type = "JSONDecodeError"
#: traceback_contains = ['File "<cell 4>", line 2, in <module>']

# %%
raise KeyError("k")
#: exception = "KeyError: 'k'"

# %%
raise ValueError
#: exception = "ValueError"
#: traceback_ends = "\nValueError\n"

# %%
assert 1 == 2, "unequal"
#: exception = "AssertionError: unequal"

# %%
{}["x"]["y"]
#: exception = "KeyError: 'x'"
