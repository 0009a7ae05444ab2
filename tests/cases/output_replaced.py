# /// case
# title = "A cell may replace its streams; later cells have their own again"
# contract = ["output"]
# ///

# %%
import sys, io, contextlib
with contextlib.redirect_stdout(io.StringIO()) as caught:
    print("caught")
print(repr(caught.getvalue()))
#: stdout = "'caught\\n'\n"

# %%
sys.stdout = io.StringIO()
sys.stderr = None
print("lost")

# %%
print("heard")
print("both", file=sys.stderr)
#: stdout = "heard\n"
#: stderr = "both\n"

# %%
sys.stdout.close()
sys.stderr.close()

# %%
print("open")
#: stdout = "open\n"

# %%
del sys.stdout
del sys.stderr

# %%
print("there")
1 / 0
#: stdout = "there\n"
#: exception = "ZeroDivisionError: division by zero"
#: stderr_contains = ["ZeroDivisionError"]

# %%
raw = sys.stdout.detach()

# %%
print("attached")
#: stdout = "attached\n"
