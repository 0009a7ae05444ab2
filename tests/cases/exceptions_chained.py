# /// case
# title = "Chained exceptions show their causes, notes and groups"
# contract = ["results"]
# plain = true
# ///

# %%
try:
    {}["k"]
except KeyError as error:
    raise ValueError("wrapped") from error
#: exception = "ValueError: wrapped"
#: traceback_contains = ["KeyError: 'k'", "The above exception was the direct cause of the following exception:"]

# %%
try:
    {}["k"]
finally:
    [][1]
#: exception = "IndexError: list index out of range"
#: traceback_contains = ["During handling of the above exception, another exception occurred:"]

# %%
try:
    {}["k"]
except KeyError:
    raise ValueError("alone") from None
#: exception = "ValueError: alone"
#: traceback_lacks = "KeyError"

# %%
error = ValueError("noted")
error.add_note("the note")
raise error
#: exception = "ValueError: noted"
#: traceback_ends = "ValueError: noted\nthe note\n"

# %%
raise ExceptionGroup("several", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])
#: exception = "ExceptionGroup: several (2 sub-exceptions)"
#: traceback_contains = ["ValueError: a", "ExceptionGroup: inner (1 sub-exception)", "KeyError: 'b'"]
