# /// case
# title = "The openenv profile echoes the last value as JSON, and finds FINAL in what is printed"
# session.profile = "openenv"
# ///

# %%
1 + 1
#: stdout = "2\n"
#: value = "2"

# %%
x = 5
#: stdout = "5\n"
#: value = "5"

# %%
print("p")
{"a": (1, None), "b": "é"}
#: stdout = '''
#: p
#: {"a": [1, null], "b": "\u00e9"}
#: '''
#: value = "{'a': (1, None), 'b': 'é'}"

# %%
object
#: stdout = "<class 'object'>\n"
#: value = "<class 'object'>"

# %%
print("no newline", end="")
7
#: stdout = "no newline\n7\n"
#: value = "7"

# %%
print("FINAL(f(x))")
#: stdout = "FINAL(f(x))\n"
#: final_answer = "f(x)"

# %%
print(FINAL_VAR("x"), FINAL_VAR("none"))
#: stdout = "FINAL(5) FINAL_VAR(none)\n"
#: final_answer = "5"

# %%
print("FINAL_VAR(x)")
#: stdout = "FINAL_VAR(x)\n"
#: final_answer = "5"

# %%
print(FINAL({"k": 1}))
#: stdout = "FINAL({'k': 1})\n"
#: final_answer = "{'k': 1}"

# %%
print(SHOW_VARS(), safe_json_dumps({"a": [1]}), format_exc() == "")
#: stdout = '''
#: ['answer', 'x'] {"a": [1]} True
#: '''

# %%
answer["content"], answer["ready"] = "done", True
#: final_answer = "done"
#: stdout = '''
#: ["done", true]
#: '''
#: value = "('done', True)"

# %%
print("again, as long as it is ready")
#: stdout = "again, as long as it is ready\n"
#: final_answer = "done"
