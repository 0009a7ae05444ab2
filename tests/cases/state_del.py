# /// case
# title = "A deleted name is gone for later cells"
# contract = ["state"]
# plain = true
# ///

# %%
x = 1
y = {"a": 1, "b": 2}
del y["a"]

# %%
del x
y
#: value = "{'b': 2}"

# %%
x
#: exception = "NameError: name 'x' is not defined"

# %%
del never
#: exception = "NameError: name 'never' is not defined"
