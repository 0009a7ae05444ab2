# /// case
# title = "A cell that computes for too long is stopped inside, keeps what it made, and the session goes on"
# contract = ["limits", "results", "output"]
# session.limits = { compute_ms = 200 }
# ///

# %%
keep = 41

# %%
print("begun")
half = 1
while True:
    pass
#: limit = "compute"
#: exception = "LimitReached: the cell computed for more than 200ms"
#: outcome = "limit"
#: stdout = "begun\n"
#: stderr_contains = "LimitReached"
#: traceback_contains = 'File "<cell 2>", line '

# %%
print(keep, half)
#: stdout = "41 1\n"

# %%
try:
    while True:
        pass
except LimitReached as error:
    print(error.limit, isinstance(error, Exception))
#: limit = "compute"
#: outcome = "completed"
#: stdout = "compute False\n"

# %%
while True:
    try:
        while True:
            pass
    except Exception:
        print("swallowed")
#: limit = "compute"

# %%
try:
    while True:
        pass
finally:
    cleaned = True
#: limit = "compute"

# %%
cleaned
#: value = "True"

# %%
try:
    while True:
        pass
except BaseException:
    raise ValueError("its own")
#: limit = "compute"
#: outcome = "raised"
#: exception = "ValueError: its own"
