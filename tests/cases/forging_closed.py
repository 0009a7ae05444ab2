# /// case
# title = "A cell that closes its standard streams does not lose the session"
# contract = ["forging", "output"]
# session.lm = "echo"
# ///

# %%
import os
keep = 41
for fd in (0, 2):
    try:
        os.close(fd)
    except OSError:
        pass

# %%
keep, llm_query("x")
#: value = "(41, 'x')"
