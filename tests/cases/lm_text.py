# /// case
# title = "Prompts and answers of any length and every character arrive as they are"
# session.lm = "echo"
# ///

# %%
texts = ["x" * n for n in (1, 1023, 1025, 4096, 16383, 16384, 100_000)]
texts += ["\xe9" * 20_000, "a\u20ac" * 20_000, "\U0001f40d" * 20_000, "\0\r\n", "", "Error: not one"]
[llm_query(text) == text for text in texts] == [True] * len(texts), llm_query_batched(texts) == texts
#: value = "(True, True)"
#: lm_prompts = 26

# %%
ascii(llm_query("a\ud800b"))
#: value_starts = '''"'a'''
#: lm_prompts = 1

# %%
class Text(str):
    pass

llm_query(Text("sub"))
#: value = "'sub'"
