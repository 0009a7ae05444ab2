# /// case
# title = "A fork begins where its session is; from then on neither sees the other"
# contract = ["restore"]
# needs = ["snapshot"]
# session.tools = ["seven"]
# session.lm = "echo"
# ///

# %%
items = [1]

# %% fork other

# %% in other
items.append(2)
items, seven(), llm_query("x")
#: value = "([1, 2], 7, 'x')"

# %%
items.append(3)
items
#: value = "[1, 3]"

# %% snapshot mine

# %% in other restore mine

# %% in other
items
#: value = "[1, 3]"

# %% in other close

# %%
items
#: value = "[1, 3]"
