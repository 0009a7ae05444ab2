# /// case
# title = "The alias `context` is kept; binding `context_0` anew moves it"
# ///

# %% context = "one"
#: index = 0

# %%
context = "mine"
#: variables = []

# %%
context
#: value = "'one'"

# %%
context_0 = "moved"

# %%
print(context, context_0)
#: stdout = "moved moved\n"

# %%
del context, context_0

# %%
context
#: value = "'moved'"
