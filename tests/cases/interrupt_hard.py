# /// case
# title = "A cell that ignores an interrupt is stopped hard after the grace"
# contract = ["limits"]
# needs = ["rollback"]
# session.limits = { grace_ms = 200 }
# ///

# %%
keep = [41]

# %% cell = { interrupt_after_ms = 200 }
keep.append(1)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
#: limit = "interrupt"
#: rolled_back = true

# %%
keep
#: value = "[41]"
