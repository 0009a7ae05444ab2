# /// case
# title = "LM calls go to the handler, their errors are strings, and the successful ones are reported in order"
# contract = ["waiting"]
# [session]
# limits = { lm_calls = 7 }
# [session.lm]
# model = "m"
# rules = [{ contains = "boom", error = "kaput" }]
# default = { response = "<${prompt}>" }
# ///

# %%
print(llm_query("a"), llm_query("boom"), llm_query_batched(["b", "boom", "c"], model="x"), llm_query_batched([]))
#: stdout = "<a> Error: kaput ['<b>', 'Error: llm() call failed - kaput', '<c>'] []\n"
#: lm_calls = [["a", "<a>"], ["b", "<b>"], ["c", "<c>"]]
#: lm_prompts = 5

# %%
llm_query_batched(["x"] * 8)[0], llm_query("still")
#: value = "('Error: LM call limit exceeded: 0 + 8 > 7', '<still>')"
#: lm_prompts = 1

# %%
for _ in range(7): llm_query("x")
llm_query("x")
#: value = "'Error: LM call limit exceeded: 7 + 1 > 7'"
#: lm_prompts = 7

# %%
llm_query("")
#: value = "'<>'"
#: lm_calls = [["", "<>"]]

# %% usage
#: calls = 12
#: models = ["m: 10", "x: 2"]

# %%
answers = llm_query_batched(("t", "u"))
type(answers).__name__, answers
#: value = "('list', ['<t>', '<u>'])"

# %% cell = { limits = { lm_calls = 0 } }
llm_query("x")
#: value = "'Error: LM call limit exceeded: 0 + 1 > 0'"
#: lm_calls = []
