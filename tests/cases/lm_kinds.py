# /// case
# title = "A call carries its kind, its model, and the depth of the session plus one"
# [session]
# lm = "depth"
# depth = 2
# ///

# %%
print(llm_query("x"), rlm_query("x", "m"), llm_query_batched(["x"], model="b"), rlm_query_batched(["x", "y"]), sep="\n")
#: stdout = """
#: Llm at 3, no model
#: Rlm at 3, m
#: ['Llm at 3, b']
#: ['Rlm at 3, no model', 'Rlm at 3, no model']
#: """

# %% open root = { lm = "depth" }

# %% in root
llm_query(prompt="x", model="named")
#: value = "'Llm at 1, named'"
