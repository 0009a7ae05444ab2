# /// case
# title = "The guest sees the environment variables that it was granted, and none of the host's"
# session.policy.env = { KAA_GIVEN = "é=1" }
# ///

# %%
import os
print(os.environ.get("KAA_GIVEN"), os.environ.get("HOME_OF_NOBODY"), os.environ.get("CARGO_MANIFEST_DIR"), os.environ.get("LOGNAME"))
#: stdout = "é=1 None None None\n"
