# /// case
# title = "A cell that is dropped while it waits for a tool is gone without a trace"
# contract = ["dropping"]
# needs = ["rollback"]
# session.tools = ["never"]
# session.lm = "never"
# ///

# %%
keep = [41]

# %% cell = { drop_after_ms = 200 }
keep.append(1)
never()
#: finished = false

# %%
keep
#: value = "[41]"
