# /// case
# title = "A fork lives on when the session that it came from is closed"
# contract = ["restore"]
# needs = ["snapshot"]
# ///

# %%
items = ["first"]

# %% fork other

# %% close

# %% in other
items
#: value = "['first']"
