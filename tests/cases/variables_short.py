# /// case
# title = "Long reprs of variables are cut at 500 characters, and a long value of a cell at 65,536"
# ///

# %%
long = "x" * 1000

# %%
row = None

# %% vars
#: names = ["long", "row"]

# %%
"y" * 100_000
#: value_starts = "'yyyy"
#: value_ends = "yyy..."
