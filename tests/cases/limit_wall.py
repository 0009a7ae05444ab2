# /// case
# title = "The wall limit reaches cells that sleep, wait for a tool, or wait for a model"
# contract = ["limits"]
# [session]
# limits = { wall_ms = 300, grace_ms = 300 }
# tools = ["never"]
# lm = "never"
# ///

# %%
keep = 41
import time, asyncio

# %%
time.sleep(100)
#: limit = "wall"
#: exception = "LimitReached: the cell took longer than 300ms"
#: outcome = "limit"
#: wall_ms_max = 5000

# %%
asyncio.run(asyncio.sleep(100))
#: limit = "wall"
#: wall_ms_max = 5000

# %%
never()
#: limit = "wall"
#: wall_ms_max = 5000
#: tool_calls = 1

# %%
llm_query("x")
#: limit = "wall"
#: wall_ms_max = 5000
#: lm_prompts = 1
#: lm_calls = []

# %%
keep
#: value = "41"
