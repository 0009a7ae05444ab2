"""Frames and values on the channel, and short representations of values.

A frame is a length, a JSON header and a raw body; or a tag (`TEXT`, `PROMPT`) and one text. A value in a header is
JSON, except that an object with one key that starts with "$" stands for something JSON cannot carry (`encode` and
`decode`). Everything used here is bound when the module is imported, and the C parts of `json` are used directly, so
that a cell which patches `json` harms only itself.
"""

import json.encoder
import json.scanner
import sys

TEXT_CHARS_MAX = 1024  # Longer text goes into the body: no JSON escaping, one copy.
DEPTH_MAX = 200
NODES_MAX = 5_000_000  # A small DAG can unfold into an endless tree.
INT_DIGITS_MAX = 100_000
INT_BITS_MAX = 332_193  # The bits of 10 ** INT_DIGITS_MAX - 1.
DECIMAL_BITS_MAX = 13_000  # About 3,900 digits: below CPython's own limit (4,300) and cheap to convert.
UNREPRESENTABLE = "<unrepresentable>"
NAME_CHARS_MAX = 1000  # A cell can give a type or a variable a name of any length.

_isinstance, _len, _type, _repr, _issubclass = isinstance, len, type, repr, issubclass
_int, _str, _bytes, _sorted, _memoryview, _id, _hex = int, str, bytes, sorted, memoryview, id, hex
_modules = sys.modules
_type_name = type.__dict__["__name__"].__get__
_inf = float("inf")


class NotRepresentable(Exception):
    """The value has no form on the channel; `args[0]` says why."""


def type_name(value):
    """The name of the value's real type, cut; neither `__class__` nor a metaclass can change it."""
    return short_name(_str.__str__(_type_name(_type(value))))  # It may be of a subclass of str.


def short_name(name):
    return name if _len(name) <= NAME_CHARS_MAX else name[:NAME_CHARS_MAX] + "..."


# --- frames ---


def _default(value):
    raise TypeError("a header cannot hold " + type_name(value))


def _make_dumps():
    try:
        make, text = json.encoder.c_make_encoder, json.encoder.c_encode_basestring
        encoder = make(None, _default, text, None, ":", ",", False, False, False)
        if "".join(encoder({"a": [1, "é"]}, 0)) == '{"a":[1,"é"]}':
            return lambda value, join="".join: join(encoder(value, 0))
    except Exception:
        pass  # A CPython whose accelerator looks different: slower, not wrong.
    return json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False).encode


dumps = _make_dumps()
_scan = (json.scanner.c_make_scanner or json.scanner.py_make_scanner)(json.JSONDecoder())
_JSONDecodeError = json.JSONDecodeError


def loads(text):
    """`json.loads`, independent of what a cell did to the module."""
    end = _len(text)
    start = end - _len(text.lstrip(" \t\n\r"))
    try:
        value, stop = _scan(text, start)
    except StopIteration as stopped:
        raise _JSONDecodeError("Expecting value", text, stopped.value) from None
    rest = text[stop:].lstrip(" \t\n\r") if stop != end else ""
    if rest:
        raise _JSONDecodeError("Extra data", text, end - _len(rest))
    return value


# Tags of frames that are one text, in UTF-8. No header is so long that its length would begin with one.
TEXT = b"T"  # An answer of the host.
PROMPT = {"llm": b"L", "rlm": b"R"}  # A prompt for the default model.


def to_utf8(text):
    """UTF-8 in which every lone surrogate became U+FFFD: no JSON reader in Rust accepts one."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        # UTF-16 also joins the halves of a pair that was built from two escapes.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def pack(header, body=b""):
    """One frame."""
    text = to_utf8(dumps(header))
    return b"".join((_len(text).to_bytes(4, "big"), text, body))


def unpack(frame):
    """The header and the body (a memoryview) of a frame; an empty frame is an empty header."""
    if not frame:
        return {}, _memoryview(b"")
    end = 4 + _int.from_bytes(frame[:4], "big")
    text = _str(frame[4:end], "utf-8")
    try:
        header, stop = _scan(text, 0)
    except StopIteration:
        stop = -1
    if stop != _len(text) or _type(header) is not dict:
        raise ValueError("a frame's header must be an object")
    return header, _memoryview(frame)[end:]


class Body:
    """The raw part of a frame that is being written."""

    __slots__ = ("nodes", "parts", "size")

    def __init__(self):
        self.parts, self.size, self.nodes = [], 0, 0

    def add(self, data):
        start = self.size
        self.parts.append(data)
        self.size = start + _len(data)
        return [start, _len(data)]

    def join(self):
        if not self.parts:
            return b""
        return b"".join([part.encode() if _type(part) is _str else part for part in self.parts])


# --- encode ---


def encode(value, body):
    """The form of `value` in a header; large and raw parts go to `body`. Raises `NotRepresentable`."""
    if _type(value) is _str:
        return _encode_text(value, body)
    try:
        return _encode(value, body, set(), 0)
    except NotRepresentable:
        raise
    except RecursionError:
        raise NotRepresentable("the value is nested too deeply") from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise NotRepresentable("reading the value raised " + type_name(error)) from None


def _encode(value, body, path, depth):
    kind = _type(value)
    if value is None or kind is bool:
        return value
    if kind is _str:
        return _encode_text(value, body)
    if kind is _int:
        return _encode_int(value)
    if kind is float:
        return _encode_float(value)
    if kind is _bytes or kind is bytearray or kind is _memoryview:
        return {"$bytes": body.add(_bytes(value))}
    identity = _id(value)
    if kind not in _CONTAINERS:
        value, kind = _plain(value, kind)
        if kind not in _CONTAINERS:
            return _encode(value, body, path, depth)
    if depth >= DEPTH_MAX:
        raise NotRepresentable("the value is nested more than %d levels deep" % DEPTH_MAX)
    if identity in path:
        raise NotRepresentable("the value contains itself")
    body.nodes += _len(value)
    if body.nodes > NODES_MAX:
        raise NotRepresentable("the value has more than %d parts" % NODES_MAX)
    path.add(identity)
    if kind is dict:
        encoded = _encode_dict(value, body, path, depth + 1)
    else:
        if kind is set or kind is frozenset:
            value = _in_order(value)
        encoded = [_encode(item, body, path, depth + 1) for item in value]
    path.discard(identity)
    return encoded


_CONTAINERS = frozenset((dict, list, tuple, set, frozenset))
# How to take the plain value out of a subclass without running the subclass's methods.
_PLAIN = (
    (bool, bool),
    (_int, _int.__int__),
    (float, float.__pos__),
    (_str, _str.__str__),
    (dict, lambda value: dict(dict.items(value))),
    (list, lambda value: list(list.__iter__(value))),
    (tuple, lambda value: tuple(tuple.__iter__(value))),
    (set, lambda value: set(set.__iter__(value))),
    (frozenset, lambda value: frozenset(frozenset.__iter__(value))),
    ((_bytes, bytearray), lambda value: _bytes(value)),
)


def _plain(value, kind):
    """The builtin value inside an instance of a subclass, or of numpy's types."""
    for base, convert in _PLAIN:
        if _issubclass(kind, base):
            plain = convert(value)
            return plain, _type(plain)
    numpy = _modules.get("numpy")
    if numpy is not None:
        if _issubclass(kind, numpy.ndarray):
            plain = value.tolist()
            return plain, _type(plain)
        if _issubclass(kind, numpy.generic):
            plain = value.item()
            if _type(plain) is not kind and _type(plain) in _SIMPLE:
                return plain, _type(plain)
    raise NotRepresentable("a value of type %s has no representation" % _type_name(kind))


_SIMPLE = frozenset((bool, _int, float, _str, _bytes))


def _in_order(value):
    try:
        return _sorted(value)
    except Exception:
        return list(value)


def _encode_text(value, body):
    if _len(value) > TEXT_CHARS_MAX:
        try:
            # One byte per character: the body encodes it, or names the place where it is.
            return {"$str": body.add(value if value.isascii() else value.encode())}
        except UnicodeEncodeError:
            return {"$wtf8": body.add(value.encode("utf-8", "surrogatepass"))}
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return {"$wtf8": body.add(value.encode("utf-8", "surrogatepass"))}
    return value


def _encode_int(value):
    if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        return value
    bits = value.bit_length()
    if bits > INT_BITS_MAX:
        raise NotRepresentable("an integer of more than %d digits has no representation" % INT_DIGITS_MAX)
    # Hexadecimal is linear in the size; decimal is not.
    return {"$int": _repr(value) if bits <= DECIMAL_BITS_MAX else _hex(value)}


def _encode_float(value):
    if value != value:
        return {"$float": "nan"}
    if value == _inf or value == -_inf:
        return {"$float": "inf" if value > 0 else "-inf"}
    return value


def _encode_dict(value, body, path, depth):
    encoded, odd = {}, False
    for key, item in value.items():
        name = key if _type(key) is _str else _key(key)
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError:
                odd = True
        encoded[name] = _encode(item, body, path, depth)
    if odd or (_len(encoded) == 1 and next(iter(encoded)).startswith("$")):
        return {"$dict": [[_encode_text(name, body), item] for name, item in encoded.items()]}
    return encoded


def _key(key):
    """A dict key as `json` writes it."""
    if key is None:
        return "null"
    if key is True:
        return "true"
    if key is False:
        return "false"
    kind = _type(key)
    if _issubclass(kind, _str):
        return _str.__str__(key)
    if _issubclass(kind, _int):
        return _int.__repr__(key)
    if _issubclass(kind, float):
        return float.__repr__(key)
    raise NotRepresentable("a dict key of type %s has no representation" % _type_name(kind))


# --- decode ---


def decode(value, body):
    """The Python value of an encoded value; `body` is the frame's body as a memoryview."""
    kind = _type(value)
    if kind is list:
        return [decode(item, body) for item in value]
    if kind is not dict:
        return value
    if _len(value) == 1:
        (name,) = value
        if name.startswith("$"):
            return _decode_special(name, value[name], body)
    return {key: decode(item, body) for key, item in value.items()}


def _decode_special(name, value, body):
    if name == "$str":
        return _str(_part(value, body), "utf-8")
    if name == "$wtf8":
        return _str(_part(value, body), "utf-8", "surrogatepass")
    if name == "$bytes":
        return _bytes(_part(value, body))
    if name == "$int":
        return _decode_int(value)
    if name == "$float":
        return float(value)
    if name == "$dict":
        return {decode(key, body): decode(item, body) for key, item in value}
    raise ValueError("unknown kind of value " + name)


def _part(span, body):
    start, size = span
    if start < 0 or size < 0 or start + size > _len(body):
        raise ValueError("a value lies outside of its frame")
    return body[start : start + size]


def _decode_int(text):
    if text.lstrip("-")[:2] in ("0x", "0X"):
        return _int(text, 16)
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if _len(digits) > INT_DIGITS_MAX:
        raise ValueError("an integer of more than %d digits" % INT_DIGITS_MAX)
    number = 0
    for start in range(0, _len(digits), 4000):  # CPython refuses to convert more than 4,300 digits at once.
        piece = digits[start : start + 4000]
        number = number * 10 ** _len(piece) + _int(piece)
    return sign * number


# --- short representations ---


class _Full(Exception):
    pass


class _Writer:
    """Writes the start of a `repr` without building the rest of it."""

    __slots__ = ("parts", "path", "room", "user_code")

    def __init__(self, room, user_code):
        self.parts, self.room, self.path, self.user_code = [], room, set(), user_code

    def write(self, text):
        self.parts.append(text)
        self.room -= _len(text)
        if self.room < 0:
            raise _Full

    def value(self, value):
        kind = _type(value)
        if kind is _str:
            self.text(value, "'" in value and '"' not in value, "")
        elif kind is _int:
            self.integer(value)
        elif kind in _BRACKETS:
            self.container(value, kind)
        elif kind is _bytes:
            self.text(value, b"'" in value and b'"' not in value, "b")
        elif kind is bytearray:
            self.write(_repr(value[: self.room + 1]))
        elif kind in _ATOMS:
            self.write(_repr(value))
        elif not self.user_code:
            self.write("<%s object>" % type_name(value))
        else:
            text = _repr(value)
            self.write(text if _type(text) is _str else _str.__str__(text))

    def text(self, value, double, prefix):
        head = _repr(value[: self.room + 1])
        content = head[_len(prefix) + 1 : -1]
        if not double and head[-1] == '"':
            content = content.replace("'", "\\'")  # The quote that decides is behind the cut.
        quote = '"' if double else "'"
        self.write(prefix + quote + content + quote)

    def integer(self, value):
        bits = value.bit_length()
        self.write(_repr(value) if bits <= DECIMAL_BITS_MAX else "<int of %d bits>" % bits)

    def container(self, value, kind):
        opening, closing, empty = _BRACKETS[kind]
        if not value:
            return self.write(empty)
        if _id(value) in self.path:
            return self.write("frozenset(...)" if kind is frozenset else opening + "..." + closing)
        if _len(self.path) >= DEPTH_MAX:
            raise _Full
        self.path.add(_id(value))
        self.write(opening)
        separate = False
        for item in value.items() if kind is dict else value:
            if separate:
                self.write(", ")
            separate = True
            if kind is dict:
                self.value(item[0])
                self.write(": ")
                item = item[1]
            self.value(item)
        if kind is tuple and _len(value) == 1:
            self.write(",")
        self.write(closing)
        self.path.discard(_id(value))


_BRACKETS = {
    list: ("[", "]", "[]"),
    tuple: ("(", ")", "()"),
    dict: ("{", "}", "{}"),
    set: ("{", "}", "set()"),
    frozenset: ("frozenset({", "})", "frozenset()"),
}
_ATOMS = frozenset((bool, float, complex, _type(None), _type(...)))


def short_repr(value, limit, user_code=True):
    """The first `limit` characters of `repr(value)`, and "..." if there are more.

    Raises whatever a `__repr__` in there raises. With `user_code` false none is called but those of plain values; the
    others are shown as `<type object>`.
    """
    writer = _Writer(limit, user_code)
    try:
        writer.value(value)
    except _Full:
        return "".join(writer.parts)[:limit] + "..."
    return "".join(writer.parts)
