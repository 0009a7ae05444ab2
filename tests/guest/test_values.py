"""Values on the channel and short representations, without a guest process."""

import importlib.util
import json
import math
import os
import random
import sys
import unittest

sys.path.insert(0, os.path.dirname(__file__))
from harness import GUEST


def load(name):
    spec = importlib.util.spec_from_file_location("kaa_test_" + name, os.path.join(GUEST, name + ".py"))
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module


values = load("values")
ATOMS = [None, True, False, 0, -1, 2**63, -(2**63), 2**64, 10**5000, 1.5, -0.0, "", "é", "'", '"', "'\"", "\\", "a\nb\0",
         "\U0001f600", "x" * 600, "'" * 30 + '"', b"", b"'", b"'\"\\\xff", "it's", 1e300, "\ud800", "$int"]


def make(random_, depth=0):
    kind = random_.randrange(7 if depth < 4 else 1)
    if kind < 2:
        return random_.choice(ATOMS)
    items = [make(random_, depth + 1) for _ in range(random_.randrange(4))]
    if kind == 2:
        return items
    if kind == 3:
        return tuple(items)
    if kind == 4:
        return {random_.choice(["a", "$x", "\ud800", "b" * 20]): item for item in items}
    kinds = (type(None), int, float, str, bytes)
    return (set if kind == 5 else frozenset)(item for item in items if isinstance(item, kinds))


def cycle(value):
    body = values.Body()
    frame = values.pack({"v": values.encode(value, body)}, body.join())
    header, data = values.unpack(frame)
    return values.decode(header["v"], data)


def plain(value):
    """What a value becomes on the channel."""
    if isinstance(value, (list, tuple, set, frozenset)):
        items = value
        if isinstance(value, (set, frozenset)):
            try:
                items = sorted(value)
            except TypeError:
                items = list(value)
        return [plain(item) for item in items]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


class ShortRepr(unittest.TestCase):
    def test_is_an_exact_prefix(self):
        random_ = random.Random(1)
        for _ in range(3000):
            value = make(random_)
            if _has_huge(value):
                continue
            whole = repr(value)
            for limit in (0, 1, 2, 5, 20, 100, 500):
                want = whole if len(whole) <= limit else whole[:limit] + "..."
                self.assertEqual(values.short_repr(value, limit), want, (value, limit))

    def test_bytearray(self):
        for value in (bytearray(), bytearray(b"'"), bytearray(b"a" * 600)):
            self.assertEqual(values.short_repr(value, 50), repr(value) if len(repr(value)) <= 50 else repr(value)[:50] + "...")

    def test_nested_deeply(self):
        value = []
        for _ in range(100_000):
            value = [value]
        self.assertEqual(values.short_repr(value, 500), "[" * 200 + "...")

    def test_without_user_code(self):
        class Hostile:
            def __repr__(self):
                raise AssertionError

        self.assertEqual(values.short_repr([1, Hostile()], 500, False), "[1, <Hostile object>]")
        self.assertEqual(values.short_repr([1, 2], 500, False), "[1, 2]")

    def test_names_of_types(self):
        class Name(str):
            def __len__(self):
                raise AssertionError

            __str__ = __getitem__ = __len__

        self.assertEqual(values.type_name(1), "int")
        self.assertEqual(type(values.type_name(type(Name("T"), (), {})())), str)
        self.assertEqual(values.type_name(type("T" * 1001, (), {})()), "T" * 1000 + "...")


def _has_huge(value):
    if isinstance(value, int):
        return value.bit_length() > 13000
    if isinstance(value, dict):
        return any(map(_has_huge, value.values()))
    return isinstance(value, (list, tuple, set, frozenset)) and any(map(_has_huge, value))


class Encoding(unittest.TestCase):
    def test_round_trip(self):
        random_ = random.Random(2)
        for _ in range(2000):
            value = make(random_)
            self.assertEqual(cycle(value), plain(value))

    def test_special(self):
        self.assertTrue(math.isnan(cycle(float("nan"))))
        self.assertEqual(cycle([float("inf"), -float("inf")]), [float("inf"), -float("inf")])
        self.assertEqual(cycle({"$str": [0, 1]}), {"$str": [0, 1]})
        self.assertEqual(cycle({1: 2, None: 3, True: 4, 1.5: 5, False: 6}),
                         json.loads(json.dumps({1: 2, None: 3, True: 4, 1.5: 5, False: 6})))
        self.assertEqual(cycle(memoryview(b"ab")), b"ab")
        self.assertEqual(values.decode({"$int": "-0x10"}, b""), -16)
        self.assertEqual(values.decode({"$int": "-" + "9" * 9000}, b"") + 10**9000, 1)

    def test_refused(self):
        cyclic, deep, dag = [], [], [0] * 10
        cyclic.append(cyclic)
        for _ in range(300):
            deep = [deep]
        for _ in range(50):
            dag = [dag] * 1000
        for value, text in ((cyclic, "contains itself"), (deep, "200 levels"), (dag, "parts"), (object(), "object"),
                            ({(1, 2): 3}, "dict key of type tuple"), (10**100_001, "100000 digits"), (1j, "complex"), ([len], "builtin")):
            with self.assertRaisesRegex(values.NotRepresentable, text):
                cycle(value)

    def test_subclasses(self):
        class Text(str):
            def __str__(self):
                raise AssertionError

        class List(list):
            def __iter__(self):
                raise AssertionError

        class Lying:
            __class__ = str

        self.assertEqual(cycle([Text("a"), List([1])]), ["a", [1]])
        self.assertIs(type(cycle(Text("a"))), str)
        with self.assertRaises(values.NotRepresentable):
            cycle(Lying())

    def test_bad_frames(self):
        self.assertEqual(values.unpack(b"")[0], {})
        for frame in (b"\0", b"\0\0\0\2[]", b"\0\0\0\4null", b"\0\0\0\3{x}", b"\0\0\0\7{\"a\":1x"):
            with self.assertRaises(ValueError):
                values.unpack(frame)
        for bad in ({"$str": [0, 99]}, {"$str": [-1, 1]}, {"$nope": 1}):
            with self.assertRaises(ValueError):
                values.decode(bad, memoryview(b"abc"))

    def test_surrogates_in_headers(self):
        self.assertEqual(values.unpack(values.pack({"a": "\ud800x\ud83d\ude00"}))[0], {"a": "\ufffdx\U0001f600"})

    def test_loads(self):
        for text in (' {"a": [1, 2.5, null]} \n', "5", '"x"', "[]"):
            self.assertEqual(values.loads(text), json.loads(text))
        for text in ("", " ", "[1", "[1] x", "{'a'}", "nul"):
            with self.assertRaises(ValueError) as ours:
                values.loads(text)
            with self.assertRaises(ValueError) as theirs:
                json.loads(text)
            self.assertEqual(str(ours.exception), str(theirs.exception))


class Imports(unittest.TestCase):
    def test_refusal(self):
        guard = load("imports").ImportGuard({})
        guard.allowed = ["math", "os.path", "numpy.*"]
        for name, allowed in (("math", True), ("mathx", False), ("os", False), ("os.path", True), ("numpy.random", True),
                              ("numpy", True), ("sys", False)):
            self.assertEqual(guard.refusal(name) is None, allowed, name)
        self.assertEqual(guard.refusal("sys"),
                         "Import of sys is not allowed. Authorized imports are: ['math', 'os.path', 'numpy.*']")


if __name__ == "__main__":
    unittest.main()
