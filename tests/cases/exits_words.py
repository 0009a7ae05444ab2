# /// case
# title = "An exit is told on stderr"
# contract = ["results"]
# ///

# %%
import sys
sys.exit("words")
#: exit_code = 1
#: stderr = "SystemExit: words\n"

# %%
sys.exit(10**30)
#: exit_code = 1

# %%
sys.exit(-1)
#: exit_code = -1
