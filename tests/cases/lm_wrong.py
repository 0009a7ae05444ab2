# /// case
# title = "Arguments of the wrong kind are error strings, in their own slot of a batch"
# session.lm = "echo"
# ///

# %%
for wrong in (None, 5, b"x", object):
    print(llm_query(wrong))
#: stdout = """
#: Error: LM query failed - a prompt must be a str or a list of chat messages, not NoneType
#: Error: LM query failed - a prompt must be a str or a list of chat messages, not int
#: Error: LM query failed - a prompt must be a str or a list of chat messages, not bytes
#: Error: LM query failed - a prompt must be a str or a list of chat messages, not type
#: """
#: lm_prompts = 0

# %%
print(llm_query_batched(["a", 5, "b"]))
print(llm_query_batched("abc"))
print(llm_query_batched(7))
print(llm_query("x", model=5))
#: stdout = """
#: ['a', 'Error: LM query failed - a prompt must be a str or a list of chat messages, not int', 'b']
#: ['Error: LM query failed - prompts must be a list of prompts, not str']
#: ['Error: LM query failed - prompts must be a list of prompts: Value after * must be an iterable, not int']
#: Error: LM query failed - model must be a str or None, not int
#: """

# %%
llm_query([{"role": "user", "content": object()}])
#: value_contains = "Error: LM query failed - the prompt cannot be sent: "

# %%
llm_query("x", model="m" * 2000)
#: value = '''"Error: the model's name has 2000 bytes; it can have 1024"'''

# %%
llm_query()
#: exception_type = "TypeError"
