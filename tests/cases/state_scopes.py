# /// case
# title = "A cell is module code: comprehensions, exec, globals and walrus see what a module's would"
# contract = ["state"]
# plain = true
# ///

# %%
base = 10
table = {k: [base + k + i for i in range(2)] for k in range(2)}
def outer():
    return [base for _ in range(1)]
print(table, outer(), (last := 5), last)
#: stdout = "{0: [10, 11], 1: [11, 12]} [10] 5 5\n"

# %%
class Box:
    size = 3
    sizes = [n for n in range(size)]

[total := total + n for total in [0] for n in []], Box.sizes
#: exception_type = "SyntaxError"

# %%
exec("made = base + 1")
eval("made + 1")
#: value = "12"

# %%
globals()["direct"] = 1
def change():
    global direct
    direct += 1
change()
direct, "direct" in vars(), __name__
#: value = "(2, True, '__main__')"

# %%
Box
#: exception = "NameError: name 'Box' is not defined"
