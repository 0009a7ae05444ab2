# What an agent does in a session: it looks at data, writes functions, makes a mistake, and sums up.
# %%
import collections, json, re

rows = [{"id": i, "kind": "abc"[i % 3], "text": f"item {i}: cost {i % 17}.50"} for i in range(500)]
print(len(rows), rows[0])
# %%
def cost(row):
    found = re.search(r"cost (\d+\.\d+)", row["text"])
    return float(found.group(1)) if found else 0.0

print(cost(rows[3]))
# %%
totals = collections.defaultdict(float)
for row in rows:
    totals[row["kind"]] += cost(row)
print(dict(totals))
# %%
try:
    print(rows[0]["price"])
except KeyError as error:
    print("no such key:", error)
# %%
text = json.dumps(rows)
again = json.loads(text)
print(len(text), again == rows)
# %%
class Basket:
    def __init__(self, kind):
        self.kind = kind
        self.rows = [row for row in rows if row["kind"] == kind]

    def dearest(self):
        return max(self.rows, key=cost)

baskets = {kind: Basket(kind) for kind in sorted(totals)}
print({kind: basket.dearest()["id"] for kind, basket in baskets.items()})
# %%
words = collections.Counter(word for row in rows for word in row["text"].split())
print(words.most_common(3))
# %%
def batches(items, size):
    for start in range(0, len(items), size):
        yield items[start:start + size]

print(sum(len(batch) for batch in batches(rows, 64)))
# %%
table = "\n".join(f"{kind:>4} {total:10.2f}" for kind, total in sorted(totals.items()))
print(table)
# %%
print("total", sum(totals.values()))
