# /// case
# title = "os._exit ends the interpreter at once: a result, and the session goes on from before the cell"
# contract = ["results"]
# needs = ["rollback"]
# ///

# %%
keep = [41]

# %%
import os
keep.append(1)
print("begun")
os._exit(7)
#: exit_code = 7
#: rolled_back = true
#: stdout = "begun\n"

# %%
keep
#: value = "[41]"
