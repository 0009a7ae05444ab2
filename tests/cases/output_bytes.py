# /// case
# title = "Bytes go to stdout as they are, also beside print, and what isn't UTF-8 is shown as U+FFFD"
# contract = ["output"]
# plain = true
# ///

# %%
import os, sys
print("a")
sys.stdout.buffer.write(b"b\n")
sys.stdout.flush()
os.write(1, b"c\n")
print("d")
#: stdout = "a\nb\nc\nd\n"

# %%
sys.stdout.buffer.write(b"\xff\x00z")
sys.stdout.buffer.flush()
os.write(2, b"e")
#: stdout = "\uFFFD\u0000z"
#: stdout_bytes = 3
#: stderr = "e"
#: value = "1"
