# /// case
# title = "A reset forgets everything but the tools, also what was done to modules and files"
# contract = ["state"]
# session.tools = ["seven"]
# ///

# %%
x = 1
import json, os, tempfile
json.dumps = None
open(os.path.join(tempfile.gettempdir(), "f"), "w").close()
answer["ready"] = True
#: final_answer = ""

# %% context = "c"
#: index = 0

# %% tool add

# %% reset

# %%
import json, os, tempfile
print("x" in globals(), "context" in globals(), json.dumps([1]), seven(), add(1, 2), os.listdir(tempfile.gettempdir()), answer)
#: stdout = "False False [1] 7 3 [] {'content': '', 'ready': False}\n"

# %% context = "again"
#: index = 0
