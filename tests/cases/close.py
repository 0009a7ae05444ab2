# /// case
# title = "Sessions are apart, and closing one leaves the others alone"
# ///

# %% open other

# %%
x = "mine"

# %% in other
"x" in globals()
#: value = "False"

# %% in other close
#: error_kind = {}

# %%
x
#: value = "'mine'"
