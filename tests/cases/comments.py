# /// case
# title = "A cell of comments, of nothing, or with odd line ends and indents is a cell like any other"
# plain = true
# ///

# %%
# only a comment

# %%


# %%
x = (1 +
     2)  # continued
y = """a
b"""; x
#: value = "3"

# %%
def f():
	return "a tab"
f() \
    + "!"
#: value = "'a tab!'"

# %%
lambda: None
#: value_starts = "<function <lambda> at 0x"
