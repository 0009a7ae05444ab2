# /// case
# title = "What LM calls cost is summed by model, and a reset doesn't take it back"
# session.lm = "echo"
# ///

# %% usage
#: calls = 0
#: models = []

# %%
len(llm_query_batched(["a", "b", "c"], model="m")), llm_query("d")
#: value = "(3, 'd')"

# %% reset

# %% usage
#: calls = 4
#: models = ["m: 3", "scripted: 1"]
