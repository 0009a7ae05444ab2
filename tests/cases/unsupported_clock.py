# /// case
# title = "A fixed clock without a seed is a session's own time, or is refused"
# contract = ["unsupported"]
# needs = ["deterministic"]
# session.policy.clock_ns = 86_400_000_000_000
# ///

# %%
import time
print(time.gmtime()[:3])
#: stdout = "(1970, 1, 2)\n"
