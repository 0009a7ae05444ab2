"""What computing costs: each part is a function that is timed by the clock of its own process."""

import json
import re
import time


def recursion():
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    fib(22)


def integers():
    n = 0
    for i in range(400_000):
        n = (n * 31 + i) % 1_000_003


def strings():
    d = {}
    for i in range(60_000):
        k = "key" + str(i % 1000)
        d[k] = d.get(k, 0) + len(k)


def json_texts():
    rows = [{"id": i, "name": "n%d" % i, "tags": ["a", "b"]} for i in range(2000)]
    for _ in range(4):
        json.loads(json.dumps(rows))


def regex():
    text = "name=alice; age=30; mail=a.b@example.org; " * 500
    for _ in range(3):
        re.findall(r"[\w.]+@[\w.]+", text)
        re.sub(r"(\w+)=(\w+)", r"\2:\1", text)


def sort_rows():
    rows = [((i * 7919) % 10_007, str(i)) for i in range(40_000)]
    rows.sort()
    sorted(rows, key=lambda row: row[1])


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def add(self, other):
        return Point(self.x + other.x, self.y + other.y)


def classes():
    p, q = Point(0, 0), Point(1, 2)
    for _ in range(60_000):
        p = p.add(q)


def arrays():
    import numpy

    a = numpy.arange(40_000, dtype=numpy.float64).reshape(200, 200) % 97
    for _ in range(4):
        a = (a @ a) % 97
    rows = (numpy.arange(200_000) * 7919) % 100_003
    for _ in range(4):
        numpy.sort(rows)
        rows.sum()


PARTS = {
    "recursion": recursion,
    "integers": integers,
    "strings": strings,
    "json": json_texts,
    "regex": regex,
    "sort": sort_rows,
    "classes": classes,
    "numpy": arrays,
}


def seconds(name):
    """How long a part takes."""
    part = PARTS[name]
    start = time.perf_counter()
    part()
    return time.perf_counter() - start
