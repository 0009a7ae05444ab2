# /// case
# title = "Each stream is cut at its cap, what comes after is counted, and the cell goes on"
# contract = ["output"]
# session.limits.output_bytes = 10
# ///

# %%
print("x" * 1_000_000)
done = True
#: stdout = "xxxxxxxxxx"
#: stdout_bytes = 1_000_001
#: stdout_kept = 10
#: stdout_truncated = true
#: stderr_truncated = false

# %%
import sys
print("0123456789", end="")
print("ä" * 6, file=sys.stderr, end="")
done
#: stdout = "0123456789"
#: stdout_truncated = false
#: stderr = "äääää"
#: stderr_bytes = 12
#: stderr_truncated = true
#: value = "True"

# %%
for _ in range(1000):
    print("many writes")
#: stdout = "many write"
#: stdout_bytes = 12_000
#: stdout_truncated = true

# %% cell = { limits = { output_bytes = 0 } }
print("nothing is kept")
#: stdout = ""
#: stdout_bytes = 16
#: stdout_truncated = true
