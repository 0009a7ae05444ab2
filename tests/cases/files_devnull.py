# /// case
# title = "What is written to os.devnull is gone"
# plain = true
# ///

# %%
import contextlib, os
with open(os.devnull, "w") as hole, contextlib.redirect_stdout(hole):
    print("into the hole")
print("seen")
#: stdout = "seen\n"
