# /// case
# title = "A context that isn't what its kind says is refused with the place, and nothing is changed"
# ///

# %% context = "first"
#: index = 0

# %% context = { "$wtf8" = "6162ff" }
#: error_kind = "Invalid"
#: error_contains = "the context is not UTF-8 at byte 2"

# %% context = { "$json" = "[1," }
#: error_kind = "Invalid"
#: error_contains = "the context is not JSON at byte 3"

# %% context = { "$json" = '{"é": x}' }
#: error_kind = "Invalid"
#: error_contains = "the context is not JSON at byte 7"

# %%
print(context, "context_1" in globals())
#: stdout = "first False\n"
