# /// case
# title = "The openenv profile cuts streams at 8,192 characters, and writes the exception before its traceback"
# session.profile = "openenv"
# ///

# %%
print("x" * 10_000)
#: stdout_starts = "xxxxxxxx"
#: stdout_ends = "xxxx\n... (truncated, total 10001 chars)"
#: stdout_kept = 8_227
#: stdout_truncated = true

# %%
print("é" * 8_191)
#: stdout_bytes = 16_383
#: stdout_truncated = false
#: stdout_starts = "é"

# %%
1 / 0
#: exception = "ZeroDivisionError: division by zero"
#: stderr_starts = "ZeroDivisionError: division by zero\nTraceback (most recent call last):\n"

# %% open short = { profile = "openenv", output_chars = 5 }

# %% in short
print("é" * 6, end="")
#: stdout = "ééééé\n... (truncated, total 6 chars)"

# %% open rlm = { output_chars = 3 }

# %% in rlm
print("abcd")
#: stdout = "abc\n... (truncated, total 5 chars)"
#: stdout_truncated = true
