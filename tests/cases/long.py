# /// case
# title = "Long code, long lines, long output and long results pass whole"
# ///

# %%
parts = []
for n in range(20_000):
    parts.append(str(n))
text = ",".join(parts)
print(text[-11:])
sum(map(len, parts))
#: stdout = "19998,19999\n"
#: value = "88890"

# %%
print(text * 5)
#: stdout_bytes = 544_446
#: stdout_truncated = false
#: stdout_starts = "0,1,2,3"

# %%
raise ValueError("m" * 200_000)
#: exception_starts = "ValueError: mmmm"
#: exception_contains = "characters left out"
