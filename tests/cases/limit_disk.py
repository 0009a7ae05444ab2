# /// case
# title = "The scratch directory has a quota, and what is deleted is given back"
# contract = ["limits"]
# session.limits = { disk_bytes = 1_048_576 }
# ///

# %%
import errno, os, tempfile
path = os.path.join(tempfile.gettempdir(), "a")
with open(path, "wb") as file:
    file.write(b"x" * 900_000)
#: value = {}

# %%
try:
    with open(path + "b", "wb") as file:
        file.write(b"x" * 900_000)
except OSError as error:
    print(error.errno == errno.ENOSPC)
#: stdout = "True\n"

# %%
for name in os.listdir(tempfile.gettempdir()):
    os.remove(os.path.join(tempfile.gettempdir(), name))
with open(path, "wb") as file:
    file.write(b"x" * 900_000)
os.path.getsize(path)
#: value = "900000"
