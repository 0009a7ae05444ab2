# /// case
# title = "With a seed and a fixed clock two sessions are alike, to the last random byte"
# contract = ["unsupported"]
# needs = ["deterministic"]
# session.policy = { seed = 7, clock_ns = 1_000_000_000_000_000_000 }
# ///

# %%
import random, os, uuid, time, datetime
def draw():
    return random.random(), os.urandom(8).hex(), str(uuid.uuid4()), {"a", "b", "c", "d"}
one = draw()
print(datetime.datetime.fromtimestamp(time.time(), datetime.timezone.utc).date(), one == draw())
time.sleep(3600)
time.time() - 1_000_000_000 > 3600
#: stdout = "2001-09-09 False\n"
#: value = "True"
#: wall_ms_max = 60_000

# %% open other = { policy = { seed = 7, clock_ns = 1_000_000_000_000_000_000 } }
