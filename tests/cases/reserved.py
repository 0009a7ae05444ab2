# /// case
# title = "Reserved names that a cell takes are theirs for that cell only"
# ///

# %%
llm_query = None
SHOW_VARS = FINAL_VAR = rlm_query = llm_query_batched = 1
print(llm_query)
#: stdout = "None\n"

# %%
print(callable(llm_query), callable(SHOW_VARS), callable(FINAL_VAR), callable(rlm_query), callable(llm_query_batched))
#: stdout = "True True True True True\n"

# %%
del llm_query, answer
__name__ = "other"
__builtins__ = {}

# %%
print(llm_query("x"), answer, __name__, len("builtins are back"))
#: stdout = "Error: No LM handler configured {'content': '', 'ready': False} __main__ 17\n"

# %%
import builtins
kept = builtins.print
builtins.print = builtins.len = None

# %%
print(len("ab"))
#: stdout = "2\n"
