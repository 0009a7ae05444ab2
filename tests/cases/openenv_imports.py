# /// case
# title = "The openenv profile refuses imports that aren't on its list, by name"
# session.profile = "openenv"
# ///

# %%
import os
#: exception_starts = "ImportError: Import of os is not allowed. Authorized imports are: ['re', 'json', 'math', "
#: stderr_starts = "ImportError: Import of os is not allowed."

# %%
import json, statistics, collections.abc
from datetime import date
print(date(2024, 1, 2))
#: stdout = "2024-01-02\n"

# %%
from subprocess import run
#: exception_starts = "ImportError: Import of subprocess is not allowed."
