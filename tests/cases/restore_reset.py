# /// case
# title = "A snapshot brings a session back also after its reset"
# contract = ["restore"]
# needs = ["snapshot"]
# ///

# %%
items = [1, {"k": (2, 3)}]

# %% context = "kept"
#: index = 0

# %% snapshot saved

# %% reset

# %%
"items" in globals(), "context" in globals()
#: value = "(False, False)"

# %% restore saved

# %%
items, context, context is context_0
#: value = "([1, {'k': (2, 3)}], 'kept', True)"

# %% context = "next"
#: index = 1
