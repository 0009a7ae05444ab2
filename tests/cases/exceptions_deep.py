# /// case
# title = "Recursion without end is a RecursionError, also in a repr, and the session goes on"
# contract = ["results", "state"]
# ///

# %%
def dig(n):
    return dig(n + 1)

dig(0)
#: exception_type = "RecursionError"
#: exception_contains = "maximum recursion depth exceeded"
#: traceback_contains = ["in dig", "more times"]

# %%
nest = []
for _ in range(100_000):
    nest = [nest]
len(repr(nest)) > 1
#: exception_type = "RecursionError"

# %%
loop = []
loop.append(loop)
loop
#: value = "[[...]]"
