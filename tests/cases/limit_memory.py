# /// case
# title = "Memory beyond the limit is a MemoryError, which a cell can catch"
# contract = ["limits"]
# session.limits = { memory_bytes = 268_435_456 }
# ///

# %%
keep = 41
block = bytes(30_000_000)
#: memory_bytes_max = 268_435_456

# %%
more = bytes(300_000_000)
#: exception_type = "MemoryError"

# %%
try:
    bytes(300_000_000)
except MemoryError:
    print("caught", keep, len(block))
#: stdout = "caught 41 30000000\n"

# %%
parts = []
try:
    while True:
        parts.append(bytes(10_000_000))
except MemoryError:
    fitted = len(parts)
    del parts
print(5 < fitted < 25)
#: stdout = "True\n"
