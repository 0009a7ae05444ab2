# /// case
# title = "Tool calls are counted per cell, and one too many raises"
# [session]
# tools = ["seven"]
# limits = { tool_calls = 3 }
# ///

# %%
[seven() for _ in range(3)]
#: value = "[7, 7, 7]"
#: tool_calls = 3

# %%
[seven() for _ in range(4)]
#: exception = "RuntimeError: tool call limit exceeded: 3 calls"
#: tool_calls = 3

# %%
seven()
#: value = "7"

# %% cell = { limits = { tool_calls = 0 } }
seven()
#: exception = "RuntimeError: tool call limit exceeded: 0 calls"
