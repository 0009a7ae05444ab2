# /// case
# title = "The answer is reported once, by the cell that makes it ready, in whatever way it does"
# ///

# %%
answer
#: value = "{'content': '', 'ready': False}"

# %%
answer["content"] = "not yet"

# %%
answer["content"] = "a"
answer["ready"] = True
#: final_answer = "a"

# %%
1
#: value = "1"

# %%
answer["ready"] = True
answer["content"] = 7
#: final_answer = "7"

# %%
answer.update(content="u", ready=True)
#: final_answer = "u"

# %%
answer = {"content": "r", "ready": True}
#: final_answer = "r"

# %%
answer["content"], answer["ready"] = "despite", True
1 / 0
#: exception = "ZeroDivisionError: division by zero"
#: final_answer = "despite"

# %%
answer = None

# %%
answer
#: value = "{'content': '', 'ready': False}"

# %%
answer["ready"] = True
#: final_answer = ""

# %%
answer |= {"content": ["list", 1], "ready": 1}
#: final_answer = "['list', 1]"

# %%
class Sly:
    def __str__(self):
        raise RuntimeError("no")
answer["content"] = Sly()
answer["ready"] = True
#: final_answer = "<unrepresentable>"

# %%
answer["content"] = "é" * 70_000
answer["ready"] = True
#: final_answer_bytes = 140_000
