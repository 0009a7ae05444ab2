# /// case
# title = "Options out of range are refused by name, of a session and of a cell"
# contract = ["results"]
# ///

# %% open a = { limits = { memory_bytes = 1 } }
#: error = "limits.memory_bytes: must be between 67108864 and 4294967296, not 1"
#: error_kind = "Invalid"

# %% open a = { limits = { fuel = 0 } }
#: error = "limits.fuel: must be between 1 and 9223372036854775807, not 0"
#: error_kind = "Invalid"

# %% open a = { limits = { wall_ms = 0 } }
#: error = "limits.wall: must be longer than 0 s and at most a year, not 0ns"

# %% open a = { limits = { compute_ms = 31_536_000_001 } }
#: error = "limits.compute: must be longer than 0 s and at most a year, not 31536000.001s"

# %% open a = { limits = { lm_concurrency = 0 } }
#: error = "limits.lm_concurrency: must be between 1 and 10000, not 0"

# %% open a = { limits = { output_bytes = 1_073_741_825 } }
#: error = "limits.output_bytes: must be between 0 and 1073741824, not 1073741825"

# %% open a = { policy = { env = { "a=b" = "" } } }
#: error = "environment variable `a=b`: the name must not be empty or have `=` in it, and neither part a NUL"

# %% open a = { tools = ["add"] }

# %% cell = { limits = { grace_ms = 0 } }
print("not run")
#: error = "limits.grace: must be longer than 0 s and at most a year, not 0ns"
#: error_kind = "Invalid"

# %%
"ready"
#: value = "'ready'"
