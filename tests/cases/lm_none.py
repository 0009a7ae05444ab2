# /// case
# title = "Without a handler every call says so"
# ///

# %%
print(llm_query("a"))
print(llm_query_batched(["a", "b"]))
print(rlm_query("a"))
print(rlm_query_batched(["a"]))
print(llm_query_batched([]))
#: stdout = """
#: Error: No LM handler configured
#: ['Error: No LM handler configured', 'Error: No LM handler configured']
#: Error: No LM handler configured
#: ['Error: No LM handler configured']
#: []
#: """
#: lm_prompts = 0
