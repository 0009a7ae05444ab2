# /// case
# title = "A cell that doesn't compile runs nothing of itself, and its line is shown"
# contract = ["results"]
# plain = true
# ///

# %%
print("never printed")
def broken(:
    pass
#: exception_type = "SyntaxError"
#: traceback_starts = '  File "<cell 1>", line 2'
#: traceback_contains = ["def broken(:", "^"]

# %%
if True:
pass
#: exception_type = "IndentationError"

# %%
	x = 1
#: exception = "IndentationError: unexpected indent (<cell 3>, line 1)"

# %%
return 5
#: exception = "SyntaxError: 'return' outside function (<cell 4>, line 1)"

# %%
nonlocal x
#: exception_type = "SyntaxError"

# %%
x = 'open
#: exception_type = "SyntaxError"
