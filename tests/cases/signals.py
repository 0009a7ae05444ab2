# /// case
# title = "A cell that takes the handler of interrupts away can still be interrupted"
# contract = ["limits"]
# session.limits = { grace_ms = 2_000 }
# ///

# %%
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
ignored = True
#: value = {}

# %% cell = { interrupt_after_ms = 200 }
while True:
    pass
#: limit = "interrupt"
#: exception_type = "KeyboardInterrupt"
#: outcome = "raised"

# %%
ignored
#: value = "True"
