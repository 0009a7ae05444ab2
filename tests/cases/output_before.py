# /// case
# title = "What was printed before an exception is kept, and the traceback is at the end of stderr"
# contract = ["output", "results"]
# plain = true
# ///

# %%
import sys
print("before")
print("warned", file=sys.stderr)
1 / 0
#: stdout = "before\n"
#: stderr_starts = "warned\nTraceback (most recent call last):\n"
#: stderr_ends = "ZeroDivisionError: division by zero\n"
#: exception = "ZeroDivisionError: division by zero"

# %%
print("again")
sys.exit(2)
#: stdout = "again\n"
#: exit_code = 2
