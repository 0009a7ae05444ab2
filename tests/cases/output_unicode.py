# /// case
# title = "Text of every plane is printed as UTF-8, and lone surrogates are escaped instead of raising"
# contract = ["output"]
# plain = true
# ///

# %%
print("é \u20ac \U0001f40d 日本")
#: stdout = "é € 🐍 日本\n"
#: stdout_bytes = 19

# %%
print("a\ud800b")
#: stdout = "a\\ud800b\n"

# %%
print("tab\there", "cr\rlf\r\n", "nul\0", sep="|", end="")
#: stdout = "tab\there|cr\rlf\r\n|nul\u0000"
