# /// case
# title = "Names that begin with an underscore are kept like any other"
# contract = ["state"]
# plain = true
# ///

# %%
_hidden = 1
__private = 2
_ = 3

# %%
_hidden, __private, _
#: value = "(1, 2, 3)"
