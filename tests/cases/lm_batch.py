# /// case
# title = "A batch is one crossing: its calls are under way at once, as many as the limit says, in order"
# contract = ["waiting"]
# [session]
# lm = "slow"
# limits = { lm_concurrency = 5, compute_ms = 400 }
# ///

# %%
llm_query_batched([f"p{n}" for n in range(20)]) == [f"p{n}" for n in range(20)]
#: value = "True"
#: at_once = 5
#: host_wait_ms_min = 600
#: compute_ms_max = 400

# %%
rlm_query_batched(["a", "b", "c"])
#: value = "['a', 'b', 'c']"
#: at_once = 3
