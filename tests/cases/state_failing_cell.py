# /// case
# title = "What a failing cell had made until then is kept, wherever it failed"
# contract = ["state"]
# plain = true
# ///

# %%
items = []
for n in range(5):
    items.append(n)
    if n == 2:
        raise RuntimeError("half-way")
#: exception = "RuntimeError: half-way"

# %%
print(items, n)
#: stdout = "[0, 1, 2] 2\n"

# %%
def fill(into):
    into.append("filled")
    return into.missing

fill(items)
#: exception = "AttributeError: 'list' object has no attribute 'missing'"

# %%
items
#: value = "[0, 1, 2, 'filled']"
