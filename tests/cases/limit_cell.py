# /// case
# title = "A cell can have limits of its own; the next one has its session's"
# contract = ["limits"]
# ///

# %% cell = { limits = { compute_ms = 150 } }
while True:
    pass
#: limit = "compute"
#: exception = "LimitReached: the cell computed for more than 150ms"
#: outcome = "limit"

# %%
import time
since = time.monotonic()
while time.monotonic() < since + 0.4:
    pass
"through"
#: value = "'through'"
