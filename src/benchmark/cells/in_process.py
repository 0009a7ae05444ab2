"""The floor: CPython's own exec, in one interpreter that goes on living.

Reads one JSON object per line, measures what it names, and writes one with the samples, or with the
reason why there are none. A session is a dict of globals, a cell is exec with its output kept.
"""

import sys

# A module that happens to lie where this is started is none of the interpreter's.
sys.path[:] = [path for path in sys.path if path]

import builtins  # noqa: E402
import contextlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
import tracemalloc  # noqa: E402

clock = time.perf_counter
# As the others have between two samples.
PAUSE = 0.001


def session():
    return {"__name__": "__main__", "__builtins__": builtins}


def run(scope, code):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<cell>", "exec"), scope)
    return out.getvalue()


def asked(prompt, model=None):
    return "yes"


def asked_slowly(prompts, seconds):
    from concurrent.futures import ThreadPoolExecutor

    def one(prompt):
        time.sleep(seconds)
        return "yes"

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def check(found, wanted):
    if found != wanted:
        raise ValueError(f"{found!r} instead of {wanted!r}")


def timed(what):
    start = clock()
    what()
    return clock() - start


def first_cell():
    check(run(session(), "print(1+1)"), "2\n")


def samples(task):
    name = task["workload"]
    if name == "session":
        return lambda: timed(first_cell)
    if name == "cell":
        scope = session()
        run(scope, "x = 1")
        return lambda: timed(lambda: check(run(scope, "print(1+1)"), "2\n"))
    if name == "llm-query":
        scope = {**session(), "llm_query": asked}
        return lambda: float(run(scope, task["code"]))
    if name == "batch":
        batch = lambda prompts: asked_slowly(prompts, task["model_seconds"])
        scope = {**session(), "llm_query_batched": batch}
        return lambda: timed(lambda: check(run(scope, task["code"]), task["stdout"]))
    if name.startswith("context-"):
        return lambda: context(task)
    if name == "agent":
        return lambda: timed(lambda: agent(task))
    if name == "rlm":
        text = long_text(task)
        return lambda: timed(lambda: loop(task, text))
    if name.startswith("cpu-"):
        scope = session()
        run(scope, task["setup"])
        return lambda: float(run(scope, task["code"]))
    if name == "memory":
        return memory
    if name == "rate":
        return rate
    raise ValueError(f"{name} is nothing that exec can be timed at")


def long_text(task):
    line, length = task["line"].encode(), task["bytes"]
    text = line * (length // len(line) + 1)
    return text[:length]


def context(task):
    text = long_text(task)
    start = clock()
    scope = session()
    scope["context"] = text.decode()
    check(run(scope, "print(len(context))"), f"{len(text)}\n")
    return clock() - start


def agent(task):
    scope = session()
    for cell in task["cells"]:
        said = run(scope, cell)
    check(said, task["stdout"])


def loop(task, text):
    scope = session()
    answer = {"content": "", "ready": False}
    scope.update(context=text.decode(), answer=answer, llm_query=asked)
    scope["llm_query_batched"] = lambda prompts: [asked(prompt) for prompt in prompts]
    for cell in task["cells"]:
        response = f"```repl\n{cell}\n```"
        for code in re.findall(r"```repl\n(.*?)\n```", response, re.DOTALL):
            run(scope, code)
    check(answer["content"], task["answer"])


HELD = []


def memory(count=500):
    # What the interpreter has taken from the system before is used again, and doesn't show there.
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            scope = session()
            run(scope, "print(1+1)")
            HELD.append(scope)
        return (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()


def rate(seconds=1.0):
    start, count = clock(), 0
    while clock() - start < seconds:
        first_cell()
        count += 1
    return count / (clock() - start)


def answer_to(task):
    if "workload" not in task:
        facts = {"python": sys.version.split()[0], "executable": sys.executable}
        return {**facts, "implementation": sys.implementation.name}
    sample = samples(task)
    since, found = clock(), []
    while len(found) < task["samples"] and (not found or clock() - since < task["seconds"]):
        found.append(sample())
        time.sleep(PAUSE)
    HELD.clear()
    return {"samples": found}


def main():
    channel = os.fdopen(os.dup(1), "w")
    # What cells print goes to their own output, not into the conversation.
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            said = answer_to(json.loads(line))
        except ModuleNotFoundError as error:
            said = {"missed": f"there is no {error.name} in its Python"}
        except Exception as error:
            said = {"missed": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=channel, flush=True)


main()
