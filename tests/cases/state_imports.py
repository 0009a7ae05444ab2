# /// case
# title = "Imports stay, and so does what is set in a module"
# contract = ["state"]
# plain = true
# ///

# %%
import json, collections as c
from itertools import accumulate
from math import *
import string
string.mine = 7

# %%
print(json.dumps({"a": [1, None]}), c.Counter("aab").most_common(1), list(accumulate([1, 2, 3])), floor(2.5))
import string as again
print(again.mine)
#: stdout = '''
#: {"a": [1, null]} [('a', 2)] [1, 3, 6] 2
#: 7
#: '''

# %%
import no_such_module_anywhere
#: exception = "ModuleNotFoundError: No module named 'no_such_module_anywhere'"

# %%
from math import no_such_name
#: exception_type = "ImportError"
