# /// case
# title = "What LM calls cost is counted also for cells that are rolled back"
# contract = ["limits"]
# needs = ["rollback"]
# [session]
# limits = { compute_ms = 200, grace_ms = 200 }
# lm = "echo"
# ///

# %%
keep = llm_query("kept")

# %%
llm_query("lost")
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
#: limit = "compute"
#: rolled_back = true
#: lm_calls = [["lost", "lost"]]

# %% usage
#: calls = 2
#: models = ["scripted: 2"]

# %%
keep
#: value = "'kept'"
