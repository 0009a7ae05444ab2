# /// case
# title = "In the openenv profile LM errors raise, and the answers beside a failure count"
# session.profile = "openenv"
# session.lm = "fail"
# ///

# %%
llm_query("x")
#: exception = "RuntimeError: kaput"

# %%
print(llm_query("fine"), llm_batch(["fine", "fine too"]))
#: stdout = "fine ['fine', 'fine too']\n"

# %%
llm_query_batched(["fine", "bad", "fine too"])
#: exception = "RuntimeError: llm() call failed - kaput"
#: lm_calls = [["fine", "fine"], ["fine too", "fine too"]]

# %% cell = { limits = { lm_calls = 0 } }
llm_query("fine")
#: exception = "RuntimeError: LM call limit exceeded: 0 + 1 > 0"

# %% open alone = { profile = "openenv" }

# %% in alone
llm_query("x")
#: exception = "NameError: name 'llm_query' is not defined"
