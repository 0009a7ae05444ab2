# /// case
# title = "Contexts are exact: texts, bytes and JSON, by number, the first also as `context`"
# ///

# %% context = "é\r\n\r\u0000\U0001F40D\""
#: index = 0

# %%
print(context is context_0, ascii(context))
#: stdout = '''
#: True '\xe9\r\n\r\x00\U0001f40d"'
#: '''

# %% context = { "$wtf8" = "eda0805c" }
#: index = 1

# %%
print(ascii(context_1))
#: stdout = '''
#: '\ud800\\'
#: '''

# %% context = { "$json" = '{"rows": [1, 2.5, null, "x", 12345678901234567890]}' }
#: index = 2

# %%
context_2
#: value = "{'rows': [1, 2.5, None, 'x', 12345678901234567890]}"

# %% context 7 = { "$bytes" = "00ff" }
#: index = 7

# %%
context_7
#: value = "b'\\x00\\xff'"

# %% context = ""
#: index = 8

# %%
print(repr(context_8), context is context_0)
#: stdout = "'' True\n"

# %% context 0 = "replaced"
#: index = 0

# %%
print(context, context_0)
#: stdout = "replaced replaced\n"
