# /// case
# title = "A cell's report names what is new, bound anew, or changed in size, with reprs of at most 500 characters"
# ///

# %%
a = [1]
b = "x" * 3
_c = 1
def f(): pass
del f
#: variables = ["a: list = [1]", "b: str = 'xxx'"]
#: new_variables = ["a", "b"]

# %%
a.append(2)
b = 1
_c = 2
#: variables = ["a: list = [1, 2]", "b: int = 1"]
#: new_variables = []

# %%
len(a)
#: value = "2"
#: variables = []

# %%
d = 1
1 / 0
#: exception = "ZeroDivisionError: division by zero"
#: variables = ["d: int = 1"]
#: new_variables = ["d"]

# %%
b = b
for i in range(3): pass
#: variables = ["b: int = 1", "i: int = 2"]
