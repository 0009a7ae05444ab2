# A package archive as context: tens of MB of text, far more than any prompt could hold, read by
# cells as a Recursive Language Model writes them.
#
#  apt-cache dumpavail > packages.txt
#  kaa run examples/packages.py --cells --context packages.txt --lm-script examples/packages.lm.json
#
# Without apt (macOS, other systems), this makes 20 MB of the same form:
#
#  python3 -c "for i in range(200000): print(f'Package: p{i}\nSection: s{i%9}\nInstalled-Size: {i%997}\nDepends: p{i%7}\nMaintainer: M{i%41}\nDescription: a', ('demo','sandbox')[i%19997==1], f'{i}\n')" > packages.txt
#
# The model's answers are scripted: packages.lm.json fills templates with what regular expressions
# find in the prompt. No model is asked, so every run gives the same report.

print(type(context).__name__, "of", len(context), "characters")
print(context[:600])

# %%
# Stanzas separated by blank lines, "Field: value" in each. Walk the text in place: splitting it
# would double the memory.
import re

FIELD = re.compile(
    r"^(Package|Version|Section|Installed-Size|Maintainer|Depends|Description): (.*)", re.M
)


def stanzas(text):
    start = 0
    while start < len(text):
        end = text.find("\n\n", start)
        if end < 0:
            end = len(text)
        yield text[start:end]
        start = end + 2


packages = {}
repeated = 0
for stanza in stanzas(context):
    fields = dict(FIELD.findall(stanza))
    name = fields.get("Package")
    if name is None:
        continue
    repeated += name in packages
    packages[name] = fields

print(len(packages), "packages;", repeated, "stanzas are about a package seen before")
incomplete = [name for name, p in packages.items() if "Section" not in p or "Description" not in p]
print(len(incomplete), "lack a section or a description:", incomplete[:5])

# %%
from collections import Counter
from statistics import median

section_of = {name: p.get("Section", "?").split("/")[-1] for name, p in packages.items()}
sections = Counter(section_of.values())
maintainers = Counter(re.sub(r"\s*<.*", "", p.get("Maintainer", "?")) for p in packages.values())
sizes = {name: int(p.get("Installed-Size", 0)) for name, p in packages.items()}
needed = Counter(
    dependency
    for p in packages.values()
    for dependency in set(re.findall(r"(?:^|, )([^ ,|:]+)", p.get("Depends", "")))
)
total_gb = sum(sizes.values()) / 1e6

print("sections")
most = max(sections.values())
for section, count in sections.most_common(8):
    print(f"  {section:<12} {count:>6}  {'#' * (count * 40 // most)}")
print("maintainers")
for maintainer, count in maintainers.most_common(5):
    print(f"  {count:>6}  {maintainer}")
print("most needed:", ", ".join(f"{name} ({count})" for name, count in needed.most_common(6)))
print(f"installed: {total_gb:.0f} GB in all, median {median(sizes.values()):.0f} kB")
# The ten largest would be ten builds of one kernel: take the largest of each section.
largest_of = {section_of[name]: name for name in sorted(sizes, key=sizes.get)}
for name in sorted(largest_of.values(), key=sizes.get, reverse=True)[:10]:
    print(f"  {sizes[name] / 1e6:>6.2f} GB  {name} ({section_of[name]})")

# %%
# The question: what does the archive offer for running code in a sandbox?
word = re.compile(r"\bsandbox", re.I)
candidates = [
    name
    for name, p in sorted(packages.items())
    if word.search(name) or word.search(p.get("Description", ""))
]
print(len(candidates), "candidates")
for name in candidates:
    print(f"  {name:<26} {packages[name].get('Description', '')}")

# %%
# A keyword also finds what only plays in a sandbox. Let the model read each one.
def card(name):
    p = packages[name]
    keys = ("Section", "Installed-Size", "Description")
    lines = [f"Package: {name}"] + [f"{key}: {p.get(key, 'unknown')}" for key in keys]
    return "\n".join(lines)


TASK = "Summarise this package in one line. Say whether it isolates programs.\n"
chosen = candidates[:24]
summaries = llm_query_batched([TASK + card(name) for name in chosen])

# A failed call fills only its own slot, with a text; ask for those once more.
failed = [i for i, summary in enumerate(summaries) if summary.startswith("Error:")]
for i in failed:
    print("retry", chosen[i], "after", summaries[i])
    summaries[i] = llm_query("Second attempt. " + TASK + card(chosen[i]))
for summary in summaries:
    print("-", summary)

# %%
isolating = [summary for summary in summaries if "isolates programs" in summary]
largest = max(sizes, key=sizes.get)
facts = f"""\
packages: {len(packages)}
sections: {len(sections)}
largest section: {sections.most_common(1)[0][0]} ({sections.most_common(1)[0][1]})
installed size: {total_gb:.0f} GB
largest package: {largest}
most needed: {needed.most_common(1)[0][0]}
candidates: {len(candidates)}
isolating: {len(isolating)}"""
report = llm_query(
    "Write a short report: what does this archive offer for running code in a sandbox?\n"
    f"Facts:\n{facts}\nFindings:\n" + "\n".join("- " + summary for summary in isolating)
)
print(report)

# %%
# Trust the code, not the model, for numbers: they must be in the report as counted.
assert str(len(packages)) in report and str(len(isolating)) in report, report
answer["content"] = report
answer["ready"] = True
