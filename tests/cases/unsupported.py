# /// case
# title = "A backend without fuel refuses a limit of it for one cell as well"
# contract = ["unsupported"]
# needs = ["fuel"]
# ///

# %%
x = 1

# %% cell = { limits = { fuel = 300_000_000 } }
while True:
    x += 1
#: limit = "fuel"

# %%
x > 1
#: value = "True"
