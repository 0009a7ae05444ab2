"""Names that every program has from its start on, and what they're bound to."""

import asyncio, base64, binascii, bisect, calendar, collections, contextlib, copy, csv, dataclasses, datetime, decimal
import difflib, enum, fractions, functools, hashlib, heapq, io, itertools, json, math, operator, pickle, random, re
import statistics, string, struct, sys, textwrap, types, unicodedata, zlib
def clip(x):
    if isinstance(x, int): return x if abs(x) < 2**150 else x % (2**61 - 1)
    if isinstance(x, float): return x if math.isfinite(x) else 0.5
    if isinstance(x, set): return {clip(k) for k in sorted(x)[:40]}
    if isinstance(x, dict): return {k: clip(v) for k, v in sorted(x.items())[:40]}
    return x[:120] if isinstance(x, (str, bytes)) else [clip(y) for y in x[:40]]
def shown(x):
    if isinstance(x, (set, frozenset)): return sorted(x)
    return x
i0, i1, i2 = 7, -3, 12345678901234567890
f0, f1 = 2.5, -0.125
s0, s1, s2 = 'spam', 'Égalité ß', ''
y0 = b'\x00bytes\xff'
l0, l1 = [3, 1, 2], []
t0, t1 = ['pear', 'Apple', 'fig'], ['a']
d0, d1 = {'a': 1, 'b': 2}, {}
z0 = {1, 2, 3}
def g0(a, b=2): return a - b
def g1(a, b=5, *rest, **named): return (a * 3 + b) % 1000
def g2(a, b): return g2(a - 1, b + 1) if 0 < a < 30 else b
class Base:
    made = 0
    def __init__(self, n=0): self.n = n; type(self).made += 1
    def __repr__(self): return f'{type(self).__name__}({self.n})'
    def __eq__(self, other): return isinstance(other, Base) and self.n == other.n
    def __lt__(self, other): return self.n < other.n
    def __hash__(self): return self.n % 97
    def __add__(self, other): return type(self)(clip(self.n + getattr(other, 'n', 1)))
    def __getitem__(self, key): return (self.n, key)
    def __len__(self): return abs(self.n) % 7
    def __call__(self, x): return clip(self.n + x)
    def __enter__(self): print('enter', self.n); return self
    def __exit__(self, kind, error, trace): print('exit', kind and kind.__name__); return self.n % 2 == 0
    def __iter__(self): return iter(range(len(self)))
    @property
    def twice(self): return self.n * 2
    @twice.setter
    def twice(self, n): self.n = clip(n) // 2
class C0(Base): pass
class C1(Base):
    def __bool__(self): return self.n > 0
o0, o1 = C0(4), C1(-1)
half = itertools.count()
