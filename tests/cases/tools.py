# /// case
# title = "Host tools take positional and keyword arguments, give values back, and raise"
# [session]
# tools = ["add", "show", "fail", "later", "echo"]
# ///

# %%
add(1, 2), show(1, "a", j=[None], k={"x": 1.5}), show()
#: value = "(3, [[1, 'a'], [['j', [None]], ['k', {'x': 1.5}]]], [[], []])"
#: tool_calls = 3

# %%
add("x")
#: exception = "TypeError: add(a, b) takes two integers"
#: traceback_contains = ['File "<cell 2>", line 1, in <module>']
#: traceback_lacks = ["<kaa>", "calls.py"]

# %%
for kind in ("KeyError", "ValueError", "ConnectionError", "StopIteration", "NoSuchError", "SystemExit", "UnicodeDecodeError"):
    try:
        fail(kind, "gone")
    except Exception as error:
        print(type(error).__name__, error)
#: stdout = """
#: KeyError 'gone'
#: ValueError gone
#: ConnectionError gone
#: StopIteration gone
#: RuntimeError gone
#: RuntimeError gone
#: RuntimeError gone
#: """

# %%
data = bytes(range(256)) * 4000
later(data) == data, type(later("x" * 5000)).__name__, later([1, (2, 3), {4}]), later(2**70)
#: value = "(True, 'str', [1, [2, 3], [4]], 1180591620717411303424)"

# %%
for text in ["x" * n for n in (1, 1023, 1025, 16384, 100_000)] + ["\xe9" * 20_000, "\U0001f40d" * 20_000, "w\ud800"]:
    assert echo(text) == text and echo([text, {"k": text}]) == [text, {"k": text}], len(text)

# %%
echo(object())
#: exception_type = "TypeError"
#: exception_contains = "an argument of echo cannot be sent: "

# %%
add.__name__, callable(add), repr(add).startswith("<function add at")
#: value = "('add', True, True)"
