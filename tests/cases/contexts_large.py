# /// case
# title = "A context of many megabytes goes in as it is"
# ///

# %% context = { "$repeat" = ["0123456789abcde\n", 1_000_000] }
#: index = 0

# %%
print(len(context), context.count("a"), context[-16:-1])
#: stdout = "16000000 1000000 0123456789abcde\n"

# %% context = { "$repeat" = ["é\U0001f40d", 500_000] }
#: index = 1

# %%
len(context_1), context_1[:2] * 500_000 == context_1
#: value = "(1000000, True)"
