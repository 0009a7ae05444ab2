# /// case
# title = "stdout and stderr are separate"
# contract = ["output"]
# plain = true
# ///

# %%
import sys
print("out")
print("err", file=sys.stderr)
sys.stdout.write("more")
print(1, 2, sep=",", end=";\n", flush=True)
#: stdout = "out\nmore1,2;\n"
#: stderr = "err\n"

# %%
import warnings
warnings.simplefilter("always")
warnings.warn("careful")
#: stderr_contains = ["UserWarning: careful"]

# %%
print("no newline", end="")
#: stdout = "no newline"

# %%
pass
