# /// case
# title = "A cell that breaks modules which everything uses breaks neither its report nor the session"
# ///

# %%
import json, traceback, linecache, os, sys
json.dumps = json.loads = traceback.format_exception = linecache.getlines = None
os.write = os.read = None
sys.modules.clear()
x = 1

# %%
x
#: value = "1"

# %%
1 / 0
#: exception = "ZeroDivisionError: division by zero"
#: stderr_contains = "ZeroDivisionError: division by zero"

# %% set y = [1, { a = "b" }]
# %% get y
#: value = [1, { a = "b" }]
