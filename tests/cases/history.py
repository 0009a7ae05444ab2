# /// case
# title = "Histories are lists of messages, by number, the first also as `history`"
# ///

# %%
"history" in globals()
#: value = "False"

# %% history = [{ role = "user", content = "hi €" }, { role = "assistant", content = "yes", n = [1, 2.5, true] }]
#: index = 0

# %%
print(history is history_0, history[0]["content"], history[1]["n"], len(history))
#: stdout = "True hi € [1, 2.5, True] 2\n"

# %% history = [{ role = "user", content = "more" }]
#: index = 1

# %% history 4 = []
#: index = 4

# %%
print(history_1[0]["content"], history_4, len(history))
history.append("mine")
#: stdout = "more [] 2\n"

# %%
history = None

# %%
len(history)
#: value = "3"
