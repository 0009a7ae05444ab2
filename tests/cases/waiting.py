# /// case
# title = "Waiting for tools, models and sleeps is wall and not compute"
# contract = ["waiting"]
# [session]
# limits = { compute_ms = 300 }
# tools = ["nap"]
# lm = "slow"
# ///

# %%
import time
nap(300)
time.sleep(0.2)
llm_query("x")
#: value = "'x'"
#: host_wait_ms_min = 640
#: compute_ms_max = 300
#: wall_ms_min = 650
