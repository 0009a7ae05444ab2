# /// case
# title = "sys.exit in all its forms is a result, and the session goes on with what the cell had made"
# contract = ["results", "state"]
# plain = true
# ///

# %%
import sys
made = 1
sys.exit(3)
#: exit_code = 3

# %%
raise SystemExit
#: exit_code = 0

# %%
sys.exit("words go to stderr")
#: exit_code = 1

# %%
exit(5)
#: exit_code = 5

# %%
sys.exit(True)
#: exit_code = 1

# %%
def deep():
    try:
        sys.exit(4)
    finally:
        print("finally")

deep()
#: stdout = "finally\n"
#: exit_code = 4

# %%
try:
    sys.exit(6)
except SystemExit as error:
    print("caught", error.code)
#: stdout = "caught 6\n"

# %%
made
#: value = "1"
