# /// case
# title = "What runs for a cell's report counts as the cell's"
# contract = ["limits"]
# session.limits = { compute_ms = 300 }
# ///

# %%
class Slow:
    def __repr__(self):
        while True:
            pass

slow = [1, Slow()]
#: outcome = "completed"
#: limit = "compute"

# %%
slow[0]
#: value = "1"
