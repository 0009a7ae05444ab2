# /// case
# title = "Sessions don't share their random numbers"
# ///

# %%
import random, os, uuid
def draw():
    return random.getrandbits(64), os.urandom(8), uuid.uuid4()
len({*draw(), *draw()})
#: value = "6"
