# /// case
# title = "A cell that traces, profiles or hooks the interpreter does that for itself alone"
# ///

# %%
import sys
seen = []
sys.settrace(lambda *what: seen.append(1))
sys.setprofile(lambda *what: None)
sys.excepthook = lambda *what: print("hooked")
sys.displayhook = lambda *what: print("displayed")
def f(): pass
f()
seen != []
#: value = "True"

# %%
sys.gettrace(), sys.getprofile()
#: value = "(None, None)"

# %%
1 / 0
#: exception = "ZeroDivisionError: division by zero"
