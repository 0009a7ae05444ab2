# /// case
# title = "The standard library is there: text, numbers, dates, archives, databases, files"
# plain = true
# ///

# %%
import re, decimal, fractions, statistics, datetime, textwrap, difflib, hashlib, base64, zlib, struct
print(re.sub(r"(\w+)@(\w+)", r"\2 at \1", "me@home"), decimal.Decimal(1) / 3, fractions.Fraction(1, 3) + 1)
print(statistics.median([3, 1, 2]), datetime.date(2024, 2, 29) + datetime.timedelta(days=366))
print(textwrap.shorten("a long line of words", 12), difflib.get_close_matches("aple", ["apple", "pear"]))
print(hashlib.sha256(b"kaa").hexdigest()[:16], base64.b64encode(b"kaa"), struct.pack(">IH", 1, 2))
print(zlib.decompress(zlib.compress(b"x" * 100)) == b"x" * 100)
#: stdout = """
#: home at me 0.3333333333333333333333333333 4/3
#: 2 2025-03-01
#: a long [...] ['apple']
#: c2759e00b2fbbcba b'a2Fh' b'\\x00\\x00\\x00\\x01\\x00\\x02'
#: True
#: """

# %%
import sqlite3, csv, io, xml.etree.ElementTree as tree, zipfile
base = sqlite3.connect(":memory:")
base.execute("create table t (n integer)")
base.executemany("insert into t values (?)", [(n,) for n in range(10)])
print(base.execute("select sum(n) from t").fetchone(), list(csv.reader(io.StringIO('a,"b,c"\n'))))
print(tree.fromstring("<a><b c='1'/></a>")[0].attrib)
with zipfile.ZipFile(io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("f", "text")
    print(archive.namelist(), archive.read("f"))
#: stdout = """
#: (45,) [['a', 'b,c']]
#: {'c': '1'}
#: ['f'] b'text'
#: """
