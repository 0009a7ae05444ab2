# /// case
# title = "Imports can be allowed by name in any profile"
# session.policy.allowed_imports = ["json"]
# ///

# %%
import json
json.loads("1")
#: value = "1"

# %%
import csv
#: exception = "ImportError: Import of csv is not allowed. Authorized imports are: ['json']"
