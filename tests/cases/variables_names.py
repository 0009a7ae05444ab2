# /// case
# title = "Names that are no identifiers, or that belong to the session, are refused by name"
# ///

# %% set "" = 1
#: error = "variable name ``: it must be a Python identifier"
#: error_kind = "Invalid"

# %% set "1a" = 1
#: error = "variable name `1a`: it must be a Python identifier"

# %% set "a b" = 1
#: error = "variable name `a b`: it must be a Python identifier"

# %% set "a.b" = 1
#: error = "variable name `a.b`: it must be a Python identifier"

# %% set class = 1
#: error_kind = "Invalid"
#: error_contains = "'class' is not the name of a variable"

# %% set llm_query = 1
#: error_kind = "Invalid"
#: error_contains = "'llm_query' is reserved"

# %% set answer = 1
#: error_kind = "Invalid"
#: error_contains = "'answer' is reserved"

# %% set __name__ = "x"
#: error_kind = "Invalid"
#: error_contains = "'__name__' is reserved"

# %% set "größe" = 3
# %%
größe
#: value = "3"

# %% get answer
#: value = { content = "", ready = false }
