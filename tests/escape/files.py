"""Every function of `os` that takes a path, by every way out, from every directory: what leaked, as JSON.

The host defines `HOST`, the directory that holds the mounts and the bait (its own path for it), and `ROOTS`, guest paths
with whether they can be written. The bait's bytes begin with `kaa-bait`; nothing else in here has them.
"""

import errno
import json
import os
import shutil
import stat

MARK = b"kaa-bait"
leaks, counts, stats = [], {}, {"tried": 0, "refused": 0, "done": 0}


def note(what, path, found):
    leaks.append("%s %r: %r" % (what, path, found))


def read_fd(fd):
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""  # Opened for writing, or a directory.
    finally:
        os.close(fd)


def opener(flags):
    return lambda path, **at: read_fd(os.open(path, flags, 0o666, **at))


def two(function, inside, first):
    """One of the paths is the way out, the other lies inside."""

    def call(path, dir_fd=None):
        names = ["src_dir_fd", "dst_dir_fd"]
        at = {} if dir_fd is None else {names[0 if first else 1]: dir_fd}
        return function(path, inside, **at) if first else function(inside, path, **at)

    return call


def linked_to(path, dir_fd=None):
    """A link whose target is the way out, and what is read through it."""
    link = WRITABLE + "/made"
    try:
        os.unlink(link)
    except OSError:
        pass
    os.symlink(path, link)
    try:
        return read_fd(os.open(link, os.O_RDONLY))
    finally:
        try:
            os.unlink(link)
        except OSError:
            pass


READ, WRITE, MAKE = os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT
# Name, function, whether it acts on a link itself when that is the last part of the path.
FUNCTIONS = [
    ("open", opener(READ), False),
    ("open write", opener(WRITE), False),
    ("open append", opener(os.O_RDWR | os.O_APPEND), False),
    ("open create", opener(MAKE), False),
    ("open create read", opener(READ | os.O_CREAT), False),
    ("open exclusive", opener(MAKE | os.O_EXCL), False),
    ("open truncate", opener(READ | os.O_TRUNC), False),
    ("open truncate write", opener(WRITE | os.O_TRUNC), False),
    ("open create truncate", opener(MAKE | os.O_TRUNC), False),
    ("open directory", opener(READ | os.O_DIRECTORY), False),
    ("open directory create", opener(MAKE | os.O_DIRECTORY), False),
    ("open nofollow", opener(READ | os.O_NOFOLLOW), False),
    ("stat", os.stat, False),
    ("lstat", lambda path, **at: os.stat(path, follow_symlinks=False, **at), True),
    ("access", lambda path, **at: os.access(path, os.F_OK, **at) or fail(), False),
    ("readlink", os.readlink, True),
    ("listdir", lambda path, dir_fd=None: os.listdir(path), False),
    ("scandir", lambda path, dir_fd=None: [entry.stat() for entry in os.scandir(path)], False),
    ("mkdir", os.mkdir, False),
    ("rmdir", os.rmdir, True),
    ("unlink", os.unlink, True),
    ("utime", lambda path, **at: os.utime(path, (1, 1), **at), False),
    ("utime nofollow", lambda path, **at: os.utime(path, (1, 1), follow_symlinks=False, **at), True),
    ("truncate", lambda path, dir_fd=None: os.truncate(path, 0), False),
    ("chdir", lambda path, dir_fd=None: chdir(path), False),
    ("copy", lambda path, dir_fd=None: shutil.copyfile(path, "/tmp/copied"), False),
    ("link through", linked_to, False),
]
PAIRS = [("rename", os.rename), ("replace", os.replace), ("link", os.link)]
REMOVING = ("rmdir", "unlink", "rename", "replace")
# All lead out. The host has put them into the mounts; those that are `made` the guest makes, there and in `/tmp`.
LINKS = {
    "abs": HOST + "/bait/secret",
    "rel": "../bait/secret",
    "up": "../bait",
    "chain": "chain2",
    "loop": "loop",
    "root": "/",
    "proc": "/proc/self",
    "dangling": "../bait/new",
    "made_up": "../bait",
    "made_new": "../bait/new",
}
MADE = ("made_up", "made_new")
WITHOUT_DIRECTORY = ("listdir", "scandir", "truncate", "chdir", "copy", "link through")


def fail():
    raise OSError(errno.ENOENT, "not there")


def chdir(path):
    os.chdir(path)
    try:
        return os.listdir(".")
    finally:
        os.chdir("/")


def ways(root, links):
    """Paths that lead out, and whether a link is their last part. `root` may be empty: then they are relative."""
    out = ["bait", "bait/secret", "bait/inner", "bait/new"]
    up = root + "/" if root else ""
    for to in out:
        for prefix in ("../", "sub/../../", "./../", "sub/./../.././", "..//", "none/../../", "sub/up/../"):
            yield up + prefix + to, False
        yield up + "../" * 40 + HOST[1:] + "/" + to, False
    for to in ("secret", "inner", "new"):
        yield up + "up/" + to, False
        yield up + "chain/" + to, False
        yield up + "sub/up/" + to, False
        yield up + "made_up/" + to, False
    for link in links:
        for end in ("", "/", "/."):
            yield up + link + end, True
    yield up + "..", False
    yield up + "../", False
    yield up + "../none", False


def absolute_ways():
    for to in ("bait", "bait/secret", "bait/inner", "bait/new"):
        for prefix in ("", "/", "//", "/.", "/..", "/../..", "/proc/self/root", "/proc/1/root", "/proc/self/cwd/../../../.."):
            yield prefix + HOST + "/" + to, False
    for path in ("/etc/passwd", "/etc", "/root", "/home", "/proc/self/environ", "/proc/self/fd/3", "/dev/fd/4/..", "/dev/null"):
        yield path, False
    for path in ("/usr/local/lib/../../../etc/passwd", "/tmp/../etc/passwd", "/tmp/../../..", "..", "../..", "/.."):
        yield path, False


def odd_ways(root):
    """Names that a parser may take for something else. They may be good names inside, so that only leaks count."""
    for to in ("bait/secret", "secret"):
        for path in (
            "..\\" + to, "%2e%2e/" + to, "...//" + to, ".../../" + to, ".. /" + to, " ../" + to, "\t../" + to, "..\0/../" + to,
            "sub\0/../../" + to, "\uff0e\uff0e/" + to, "\u2025/" + to, "../\u202e" + to, "n" * 5000 + "/../../" + to,
            "sub/../" * 2000 + "../" + to, "./" * 50000 + "../" + to, "C:\\" + to, "file://" + HOST + "/" + to, "~/../" + to,
        ):
            yield root + "/" + path
    raw = root.encode() + b"/"
    for path in (b"\xff/../../bait/secret", b"\xc0\xae\xc0\xae/bait/secret", b"\xe0\x80\xae./bait/secret", b"\x80", b"..\xff/x"):
        yield raw + path


def attempt(name, function, path, may_act, **at):
    stats["tried"] += 1
    try:
        found = function(path, **at)
    except (OSError, ValueError, NotImplementedError) as error:
        stats["refused"] += 1
        kind = type(error).__name__
        counts[kind] = counts.get(kind, 0) + 1
        return
    stats["done"] += 1
    if MARK in (found if isinstance(found, bytes) else repr(found).encode("utf-8", "surrogateescape")):
        note(name + " read", path, found)
    elif not may_act:
        note(name + " did", path, found)


def mend(root, path):
    """Makes a link again that a function took away or replaced, which those that act on links may."""
    name = path.rstrip("/.").rsplit("/", 1)[-1]
    link = root + "/" + name
    try:
        if stat.S_ISLNK(os.lstat(link).st_mode):
            return
    except OSError:
        pass
    for remove in (os.unlink, os.rmdir):
        try:
            remove(link)
        except OSError:
            pass
    try:
        os.symlink(LINKS[name], link)
    except OSError:
        pass


def can_be_mended(path):
    """A guest can't make a link to an absolute path."""
    return not LINKS[path.rstrip("/.").rsplit("/", 1)[-1]].startswith("/")


def try_all(paths, root, removing=False, **at):
    inside = WRITABLE + "/inside"
    writable = dict(ROOTS).get(root)
    for path, is_link in paths:
        calls = [(name, function, on_link) for name, function, on_link in FUNCTIONS if not at or name not in WITHOUT_DIRECTORY]
        # A link that is renamed or replaced goes by itself.
        calls += [(name + " from", two(function, WRITABLE + "/moved", True), True) for name, function in PAIRS]
        calls += [(name + " to", two(function, inside, False), True) for name, function in PAIRS]
        calls += [("symlink", lambda path, **at: os.symlink("x", path, **at), False)]
        for name, function, on_link in calls:
            if is_link and writable:
                mend(root, path)
                if not can_be_mended(path) and name.startswith(REMOVING) != removing:
                    continue  # What takes them away comes at the end.
            if name.endswith((" from", " to")):
                with open(inside, "w") as file:
                    file.write("inside")
            attempt(name, function, path, is_link and on_link, **at)


WRITABLE = next(path for path, writable in ROOTS if writable and path != "/tmp")
for root, _ in ROOTS:
    links = LINKS if root in ("/data", WRITABLE) else MADE
    for name in links:
        mend(root, name)
    try_all(ways(root, links), root)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try_all(ways("", links), root, dir_fd=fd)
    try_all([(path, False) for path, _ in absolute_ways()][:12], root, dir_fd=fd)
    os.close(fd)
    for path in odd_ways(root):
        for name, function, _ in FUNCTIONS:
            attempt(name, function, path, True)
try_all(absolute_ways(), "/")
# Descriptors that a session begins with, those that it hasn't, and negative ones.
for fd in [*range(65), -1, -2, 2**31 - 1]:
    for path in ("../bait/secret", HOST[1:] + "/bait/secret", "../../../../../../.." + HOST + "/bait/secret", "up/secret", "sub/up/secret"):
        for name, function, _ in FUNCTIONS[:20]:
            if name not in WITHOUT_DIRECTORY:
                attempt(name, function, path, False, dir_fd=fd)
absolute = [(WRITABLE + "/" + name, True) for name in LINKS if not can_be_mended(name)]
try_all(absolute, WRITABLE, removing=True)
print(json.dumps({"leaks": leaks[:40], "count": len(leaks), **stats, "kinds": counts}))
