# The cells of a model that looks for something in a long text, asks about what it finds, and answers.
# %%
print(type(context), len(context), context[:60])
# %%
import re

found = [match.start() for match in re.finditer("needle", context)]
print(len(found))
first = [llm_query("Is this it? " + context[at:at + 40]) for at in found[:4]]
print(first)
# %%
step = len(context) // 16
said = llm_query_batched(["Sum this up: " + context[at:at + 100] for at in range(0, step * 16, step)])
print(len(said))
# %%
answer["content"] = f"{len(found)} needles, {len(first) + len(said)} answers"
answer["ready"] = True
