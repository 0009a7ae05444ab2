# /// case
# title = "Values of every kind cross in both directions, to the last digit and byte"
# ///

# %% set none = { "$none" = true }
# %% get none
#: value = { "$none" = true }
#: found = true

# %% set flag = true
# %% get flag
#: value = true

# %% set small = -5
# %% get small
#: value = -5

# %% set edge = -9223372036854775808
# %% get edge
#: value = -9223372036854775808

# %% set large = { "$int" = "123456789012345678901234567890" }
# %% get large
#: value = { "$int" = "123456789012345678901234567890" }

# %% set half = 0.5
# %% get half
#: value = 0.5

# %% set endless = -inf
# %% get endless
#: value = -inf

# %% set nothing = nan
# %% get nothing
#: value = nan

# %% set text = "é\r\n\u0000 ]\U0001f40d"
# %% get text
#: value = "é\r\n\u0000 ]\U0001f40d"

# %% set long = { "$repeat" = ["löng", 5000] }
# %% get long
#: value = { "$repeat" = ["löng", 5000] }

# %% set half_a_pair = { "$wtf8" = "61eda08062" }
# %% get half_a_pair
#: value = { "$wtf8" = "61eda08062" }

# %% set raw = { "$bytes" = "0001ff" }
# %% get raw
#: value = { "$bytes" = "0001ff" }

# %% set nested = [1, "x", [], { k = [{ "$none" = true }, { "$bytes" = "00" }] }]
# %% get nested
#: value = [1, "x", [], { k = [{ "$none" = true }, { "$bytes" = "00" }] }]

# %% set dollar = { other = 1, "$bytes" = "kept" }
# %% get dollar
#: value = { other = 1, "$bytes" = "kept" }

# %%
print(none, flag, small, edge, large + 1, half, endless, nothing)
print(ascii(text), len(long), ascii(half_a_pair), raw, nested, dollar)
#: stdout = '''
#: None True -5 -9223372036854775808 123456789012345678901234567891 0.5 -inf nan
#: '\xe9\r\n\x00 ]\U0001f40d' 20000 'a\ud800b' b'\x00\x01\xff' [1, 'x', [], {'k': [None, b'\x00']}] {'$bytes': 'kept', 'other': 1}
#: '''
