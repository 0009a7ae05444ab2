# /// case
# title = "A snapshot is gone back to with everything in it: generators half-way, random state, patched modules, files"
# contract = ["restore"]
# needs = ["snapshot"]
# ///

# %%
import random, json, tempfile, os
squares = (n * n for n in range(10))
print(next(squares))
random.seed(5)
drawing = random.getstate()
json.mine = 7
path = os.path.join(tempfile.gettempdir(), "f")
with open(path, "w") as file:
    file.write("saved")
#: stdout = "0\n"

# %% snapshot before

# %%
after = next(squares), random.random()
squares = None
del json.mine
os.remove(path)

# %% set drawn = 0

# %% restore before

# %%
print(next(squares), random.getstate() == drawing, json.mine, open(path).read(), "after" in globals(), "drawn" in globals())
#: stdout = "1 True 7 saved False False\n"

# %% restore before

# %%
next(squares)
#: value = "1"
