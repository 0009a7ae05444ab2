# /// case
# title = "Sources of cells are there for inspect, and each cell has its own name in tracebacks"
# ///

# %%
import inspect
def double(n):
    return n * 2
made = True

# %%
print(inspect.getsource(double), end="")
#: stdout = "def double(n):\n    return n * 2\n"

# %%
double(object())
#: exception_type = "TypeError"
#: traceback_contains = ['File "<cell 3>", line 1, in <module>', 'File "<cell 1>", line 3, in double', "    return n * 2"]
