# /// case
# title = "Closures, decorators and default arguments keep what they hold"
# contract = ["state"]
# plain = true
# ///

# %%
import functools

def counter():
    n = 0
    def step(by=1):
        nonlocal n
        n += by
        return n
    return step

def twice(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs), function(*args, **kwargs)
    return wrapped

step = counter()
step()
#: value = "1"

# %%
@twice
def greet(name, *, mark="!"):
    "Greets."
    return name + mark

step(by=10), greet("a"), greet("b", mark="?"), greet.__doc__, greet.__name__
#: value = "(11, ('a!', 'a!'), ('b?', 'b?'), 'Greets.', 'greet')"

# %%
adders = [lambda x, n=n: x + n for n in range(3)]
late = [lambda: n for n in range(3)]
[add(10) for add in adders], [function() for function in late]
#: value = "([10, 11, 12], [2, 2, 2])"
