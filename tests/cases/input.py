# /// case
# title = "There is nobody to answer input: it is at its end"
# plain = true
# ///

# %%
input("Name? ")
#: stdout = "Name? "
#: exception_type = "EOFError"

# %%
import sys
print(repr(sys.stdin.read()))
#: stdout = "''\n"
