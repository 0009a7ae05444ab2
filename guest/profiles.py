"""The dialects of cells: which globals they find, and what happens to the value of the last statement.

A profile is a row of a table; what differs in kind between profiles is in the small functions below the table.
"""

import json
import sys
import traceback

OPENENV_IMPORTS = (
    "re json math random collections itertools functools operator string textwrap difflib statistics decimal fractions "
    "datetime copy pprint typing dataclasses enum bisect heapq array struct base64 hashlib hmac uuid "
    "queue stat time unicodedata"
).split()
_dumps, _repr, _str, _type = json.dumps, repr, str, type


class Profile:
    """One dialect."""

    def __init__(
        self,
        name,
        functions,
        echo,
        assignments=False,
        lm_raises=False,
        imports=None,
        level=False,
        needs_models=False,
    ):
        self.name = name
        self.functions = functions  # (agent) -> globals by name.
        self.echo = echo  # "silent" or "json": what is printed of the last value.
        self.assignments = assignments  # Whether a last assignment has a value.
        self.lm_raises = lm_raises  # Whether a failed model call raises instead of answering with a string.
        self.imports = imports
        self.level = level  # Final answer: found again after every cell (openenv), or once.
        self.copies_output = level
        self.needs_models = needs_models  # Whether the functions depend on there being models to ask.


def _models(agent):
    models = agent.models

    def llm_query(prompt, model=None):
        """Ask a language model one question and return its answer as a str. Errors come back as "Error: ..."."""
        return models.query("llm", prompt, model)

    def llm_query_batched(prompts, model=None):
        """Ask many questions at once; the answers come back as a list in the same order. Much faster than a loop."""
        return models.query_batched("llm", prompts, model)

    def rlm_query(prompt, model=None):
        """Give a task to a recursive model that has a session of its own, and return its answer as a str."""
        return models.query("rlm", prompt, model)

    def rlm_query_batched(prompts, model=None):
        """Give many tasks to recursive models at once; the answers come back as a list in the same order."""
        return models.query_batched("rlm", prompts, model)

    return {f.__name__: f for f in (llm_query, llm_query_batched, rlm_query, rlm_query_batched)}


def _rlm(agent):
    namespace = agent.namespace

    def SHOW_VARS():
        """Return a str that lists the variables of this session with their types."""
        return namespace.show_vars()

    def FINAL_VAR(variable_name):
        """Return the value of the variable with this name as a str, to give it as the final answer."""
        return namespace.final_var(variable_name)

    return {**_models(agent), "SHOW_VARS": SHOW_VARS, "FINAL_VAR": FINAL_VAR}


def _openenv(agent):
    namespace = agent.namespace

    def FINAL(value):
        """Mark `value` as the final answer: print what this returns, or make it the last line of the cell."""
        return "FINAL(%s)" % (value,)

    def FINAL_VAR(name):
        """Mark the value of the variable called `name` as the final answer."""
        value = namespace.names.get(name) if _type(name) is _str else None
        return "FINAL_VAR(%s)" % (name,) if value is None else "FINAL(%s)" % (value,)

    def SHOW_VARS():
        """Return the sorted list of the variables' names."""
        return sorted([*namespace.variables(), "answer"])

    def format_exc():
        """Return the traceback of the exception that is being handled, as a str."""
        return traceback.format_exc() if sys.exc_info()[1] is not None else ""

    def safe_json_dumps(obj):
        """Return `obj` as JSON; what JSON cannot hold becomes its repr."""
        return json_text(obj)

    found = {} if not agent.models.available else _models(agent)
    if found:
        found["llm_batch"] = found["llm_query_batched"]
    for function in (FINAL, FINAL_VAR, SHOW_VARS, format_exc, safe_json_dumps):
        found[function.__name__] = function
    return found


PROFILES = {
    "rlm": Profile("rlm", _rlm, "silent"),
    "openenv": Profile(
        "openenv",
        _openenv,
        "json",
        assignments=True,
        lm_raises=True,
        imports=OPENENV_IMPORTS,
        level=True,
        needs_models=True,
    ),
}


def json_text(value):
    """A value as OpenEnv prints it."""
    try:
        return _dumps(value)
    except Exception:
        return _repr(value)


def openenv_final(output, namespace):
    """The final answer in OpenEnv's order: `FINAL(...)` in the output, `FINAL_VAR(name)` there, the dict `answer`."""
    start = output.find("FINAL(")
    while start >= 0:
        inner = _balanced(output, start + 6)
        if inner is not None:
            return inner.strip()
        start = output.find("FINAL(", start + 6)
    start = output.find("FINAL_VAR(")
    while start >= 0:
        name, closing, _ = output[start + 10 :].partition(")")
        if closing and name.isidentifier():
            value = namespace.names.get(name)
            if value is not None:
                return _str(value)
            break
        start = output.find("FINAL_VAR(", start + 10)
    return None


def _balanced(text, start):
    """The text up to the parenthesis that closes the one before `start`; None if it is never closed."""
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return text[start:index]
    return None
