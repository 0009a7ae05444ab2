# /// case
# title = "State made by one cell is there for the next, also when the cell later raised"
# contract = ["state", "results"]
# plain = true
# ///

# %%
x = 1
import math

def area(r):
    return math.pi * r * r

class A:
    n = 3

# %%
y = 2
1 / 0
z = 3
#: exception = "ZeroDivisionError: division by zero"

# %%
print(x, y, area(1) > 3, A.n, "z" in globals())
#: stdout = "1 2 True 3 False\n"
