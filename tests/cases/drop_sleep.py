# /// case
# title = "A cell that is dropped while it sleeps is gone without a trace"
# contract = ["dropping"]
# needs = ["rollback"]
# session.tools = ["never"]
# session.lm = "never"
# ///

# %%
keep = [41]

# %% cell = { drop_after_ms = 200 }
keep.append(1)
__import__("time").sleep(60)
#: finished = false

# %%
keep
#: value = "[41]"
