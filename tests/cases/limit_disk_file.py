# /// case
# title = "A file that is larger than all files may be can't be written, and the session goes on"
# contract = ["limits"]
# session.limits = { disk_bytes = 1_048_576 }
# ///

# %%
import os, tempfile
path = os.path.join(tempfile.gettempdir(), "a")
with open(path, "wb") as file:
    for _ in range(100):
        file.write(b"x" * 100_000)
#: exception_type = "OSError"

# %%
os.path.getsize(path) <= 1_048_576
#: value = "True"

# %%
os.remove(path)
with open(path, "wb") as file:
    file.write(b"x" * 900_000)
os.path.getsize(path)
#: value = "900000"
