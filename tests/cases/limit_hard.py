# /// case
# title = "A cell that refuses to stop is rolled back, and the session goes on"
# contract = ["limits", "output"]
# needs = ["rollback"]
# [session]
# limits = { compute_ms = 200, grace_ms = 200 }
# ///

# %%
keep = [41]

# %%
keep.append(1)
print("begun")
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
#: limit = "compute"
#: rolled_back = true
#: stdout = "begun\n"

# %%
print(keep)
#: stdout = "[41]\n"
