# /// case
# title = "Variables are listed with type and short repr, without what isn't the cells' own, and no code of theirs runs for it"
# ///

# %% vars
#: names = []

# %%
class Shy:
    def __repr__(self):
        print("you asked")
        return "shy"

number = 1
_hidden = 2
mixed = [1, (2,), {"k": None}]
shy = [Shy()]
import math
def function(): pass
#: stdout = "you asked\n"
#: new_variables = ["Shy", "number", "mixed", "shy", "math", "function"]

# %% vars
#: names = ["Shy", "number", "mixed", "shy", "math", "function"]

# %%
del Shy, math, function

# %% vars
#: variables = ["number: int = 1", "mixed: list = [1, (2,), {'k': None}]", "shy: list = [<Shy object>]"]
