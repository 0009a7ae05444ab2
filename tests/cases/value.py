# /// case
# title = "The last expression is the value of a cell, and prints nothing; None is no value"
# plain = true
# ///

# %%
1 + 1
#: value = "2"

# %%
x = 5

# %%
None

# %%
x
# A comment after it.
#: value = "5"

# %%
if True:
    x

# %%
x; 7;
#: value = "7"

# %%

# %%
"multi\nline"
#: value = "'multi\\nline'"

# %%
print("printed")
#: stdout = "printed\n"

# %%
(yielded for yielded in "ab").__class__.__name__, [*range(3)], {"k": {1}}, b"b", 1.5, ...
#: value = "('generator', [0, 1, 2], {'k': {1}}, b'b', 1.5, Ellipsis)"
