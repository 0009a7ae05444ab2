# /// case
# title = "An interrupt stops the running cell with KeyboardInterrupt, and does nothing when there is none"
# contract = ["limits"]
# session.tools = ["never"]
# ///

# %% interrupt

# %%
x = 1
print("not me")
#: stdout = "not me\n"

# %% cell = { interrupt_after_ms = 200 }
while True:
    pass
#: limit = "interrupt"
#: exception = "KeyboardInterrupt: interrupted"
#: outcome = "raised"

# %% cell = { interrupt_after_ms = 200 }
import time
time.sleep(60)
#: limit = "interrupt"
#: exception_type = "KeyboardInterrupt"
#: outcome = "raised"
#: wall_ms_max = 10_000

# %% cell = { interrupt_after_ms = 200 }
never()
#: limit = "interrupt"
#: exception_type = "KeyboardInterrupt"
#: outcome = "raised"

# %% cell = { interrupt_after_ms = 200 }
try:
    while True:
        pass
except KeyboardInterrupt:
    print("caught")
#: limit = "interrupt"
#: outcome = "completed"
#: stdout = "caught\n"

# %%
x
#: value = "1"
