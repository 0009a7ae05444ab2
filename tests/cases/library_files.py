# /// case
# title = "Files can be written and read in the temporary directory, and later cells find them"
# contract = ["state"]
# ///

# %%
import os, tempfile
path = os.path.join(tempfile.gettempdir(), "notes.txt")
with open(path, "w", encoding="utf-8") as file:
    file.write("one\ntwo €\n")

# %%
print(open(path, encoding="utf-8").read().split(), os.path.getsize(path))
with tempfile.TemporaryDirectory() as directory:
    inner = os.path.join(directory, "a")
    os.mkdir(inner)
    print(os.listdir(directory))
print(os.path.exists(directory))
#: stdout = "['one', 'two', '€'] 12\n['a']\nFalse\n"

# %%
import pathlib, shutil
pathlib.Path(path).rename(path + ".old")
print(pathlib.Path(path).exists(), pathlib.Path(path + ".old").read_text(encoding="utf-8").count("\n"))
os.remove(path + ".old")
open(path)
#: stdout = "False 2\n"
#: exception_type = "FileNotFoundError"
