# /// case
# title = "Generators and iterators go on where they were in an earlier cell"
# contract = ["state"]
# plain = true
# ///

# %%
def talk():
    got = yield "first"
    while got != "stop":
        got = yield f"got {got}"
    return "done"

def chain():
    result = yield from talk()
    yield f"after {result}"

talker = chain()
next(talker)
#: value = "'first'"

# %%
talker.send("a")
#: value = "'got a'"

# %%
talker.send("stop")
#: value = "'after done'"

# %%
next(talker)
#: exception_type = "StopIteration"

# %%
lines = iter("abc")
next(lines)
#: value = "'a'"

# %%
print(*lines, sep="-")
#: stdout = "b-c\n"
