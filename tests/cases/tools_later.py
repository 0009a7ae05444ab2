# /// case
# title = "Tools can be registered later, replaced, and must have names that are free"
# ///

# %%
seven()
#: exception = "NameError: name 'seven' is not defined"

# %% tool seven
# %%
seven()
#: value = "7"

# %% tool echo = "seven"
# %%
seven(8)
#: value = "8"

# %% tool seven = "context"
#: error_kind = "Invalid"
#: error_contains = "Custom tools cannot override reserved REPL functions: ['context']. Reserved names: ['FINAL', 'FINAL_VAR', 'SHOW_VARS', 'answer', "

# %% tool seven = "no name"
#: error = "tool name `no name`: it must be a Python identifier"

# %%
seven = "mine"

# %%
seven("back")
#: value = "'back'"
