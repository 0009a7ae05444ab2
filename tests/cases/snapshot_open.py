# /// case
# title = "A session with open files refuses the snapshot and names them"
# contract = ["restore"]
# needs = ["snapshot"]
# ///

# %%
import os, tempfile
file = open(os.path.join(tempfile.gettempdir(), "left_open.txt"), "w")

# %% snapshot refused
#: error_kind = "Invalid"
#: error_contains = "left_open.txt"

# %%
file.close()

# %% snapshot fine
