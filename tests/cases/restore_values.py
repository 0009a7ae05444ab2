# /// case
# title = "Functions, classes, shared objects and modules are as they were after a restore"
# contract = ["restore"]
# needs = ["snapshot"]
# ///

# %%
import math
items = [1]
class Box:
    def __init__(self, items):
        self.items = items
def area(r):
    return math.floor(r * scale)
scale, box = 2, Box(items)
def counter():
    n = 0
    def step():
        nonlocal n
        n += 1
        return n
    return step
step = counter()
step()
#: value = "1"

# %% snapshot saved

# %%
scale, box, items = 5, None, None
step(), step()
#: value = "(2, 3)"

# %% restore saved

# %%
items.append(2)
scale += 1
box.items, area(1.5), isinstance(box, Box), step(), math.pi > 3
#: value = "([1, 2], 4, True, 2, True)"
