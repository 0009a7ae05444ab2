# /// case
# title = "A cell that waits again and again is stopped hard"
# contract = ["limits"]
# needs = ["rollback"]
# [session]
# limits = { wall_ms = 300, grace_ms = 300 }
# tools = ["never"]
# ///

# %%
keep = [41]

# %%
keep.append(1)
while True:
    try:
        never()
    except BaseException:
        pass
#: limit = "wall"
#: rolled_back = true

# %%
keep
#: value = "[41]"
