# /// case
# title = "A file without a directory is written into the scratch directory, where cells start"
# ///

# %%
with open("relative.txt", "w") as file:
    file.write("here")
import os, tempfile
print(open("relative.txt").read(), os.path.samefile(os.getcwd(), tempfile.gettempdir()))
#: stdout = "here True\n"
