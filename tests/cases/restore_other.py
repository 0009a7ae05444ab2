# /// case
# title = "A snapshot can be gone over to by another session, which keeps its own tools and limits"
# contract = ["restore"]
# needs = ["snapshot"]
# session.tools = ["seven"]
# ///

# %%
made = "here"

# %% snapshot saved

# %% open other = { tools = ["add"], limits = { tool_calls = 1 } }

# %% in other restore saved

# %% in other
made, add(1, 2), "seven" in globals()
#: value = "('here', 3, False)"

# %% in other
add(1, 2), add(1, 2)
#: exception = "RuntimeError: tool call limit exceeded: 1 calls"

# %%
made, seven()
#: value = "('here', 7)"
