# /// case
# title = "SHOW_VARS and FINAL_VAR say what RLM's do, word by word"
# ///

# %%
print(SHOW_VARS())
#: stdout = "No variables created yet. Use ```repl``` blocks to create variables.\n"

# %%
FINAL_VAR("x")
#: value = '''"Error: Variable 'x' not found. No variables have been created yet. You must create and assign a variable in a REPL block BEFORE calling FINAL_VAR on it."'''

# %%
x = 5
_y = 1

# %%
print(SHOW_VARS())
print(FINAL_VAR("x"), FINAL_VAR(' "x" '), FINAL_VAR(x))
print(FINAL_VAR("y"))
#: stdout = """
#: Available variables: {'x': 'int'}
#: 5 5 5
#: Error: Variable 'y' not found. Available variables: ['x']. You must create and assign a variable BEFORE calling FINAL_VAR on it.
#: """
