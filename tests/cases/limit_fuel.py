# /// case
# title = "Fuel is counted, and a cell that uses it up is stopped"
# contract = ["limits", "unsupported"]
# needs = ["fuel"]
# session.limits = { fuel = 2_000_000_000 }
# ///

# %%
n = 0

# %%
while True:
    n += 1
#: limit = "fuel"
#: exception = "LimitReached: the cell used up its 2000000000 units of fuel"
#: outcome = "limit"

# %%
n > 1000
#: value = "True"
