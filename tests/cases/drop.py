# /// case
# title = "A cell whose future is dropped is rolled back"
# contract = ["dropping"]
# needs = ["rollback"]
# ///

# %%
keep = [41]

# %% cell = { drop_after_ms = 200 }
keep.append(1)
while True:
    pass
#: finished = false

# %%
keep
#: value = "[41]"
