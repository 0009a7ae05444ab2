# /// case
# title = "A crash of the interpreter is an exit with 134 that rolls the session back"
# contract = ["results", "output"]
# needs = ["rollback"]
# ///

# %%
keep = [41]

# %%
import os
keep.append(1)
print("begun")
os.abort()
#: exit_code = 134
#: rolled_back = true
#: stdout = "begun\n"

# %%
keep
#: value = "[41]"
