"""Every function of `os` that takes a path, by every way out, from every directory: what leaked, as JSON.

The host defines `HOST`, the directory that holds the mounts and the bait (its own path for it), and `ROOTS`: guest paths, each
with the descriptor under which the session has it, and the directory where something can be made to be moved or linked there.
The bait's bytes begin with `kaa-bait`; nothing else in here has them.

A refusal says something only if the function does its work where it may: first each is called on good paths, in every
directory and by every way to name one, and its work is looked at. What it's called with there is the same but for the path.
"""

import collections
import errno
import json
import os
import posix
import re
import shutil
import stat

MARK, PLAIN = b"kaa-bait", b"plain"
leaks, idle, counts = [], [], {}
stats = {"controls": 0, "tried": 0, "refused": 0, "done": 0}
Function = collections.namedtuple("Function", "name call good proof on_link at", defaults=(False, True))


def note(what, path, found):
    leaks.append("%s %r: %r" % (what, path, found))


def fail():
    raise OSError(errno.ENOENT, "not there")


def opener(flags, reads=True, writes=False):
    """What is read through a descriptor; what it lets write is written."""

    def call(path, **at):
        fd = os.open(path, flags, 0o666, **at)
        try:
            found = os.read(fd, 4096) if reads else b""
            if writes:
                os.write(fd, b"written")
            return found
        finally:
            os.close(fd)

    return call


def directory_opener(make):
    """What is read, or made, in a directory by way of a descriptor for it."""

    def call(path, **at):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY, **at)
        try:
            if make:
                return os.mkdir("made", dir_fd=fd)
            found = [opener(READ)(name, dir_fd=fd) for name in ("plain", "secret") if os.access(name, os.F_OK, dir_fd=fd)]
            return b"".join(found)
        finally:
            os.close(fd)

    return call


def two(function, first):
    """One of the paths is the way out, the other lies inside."""

    def call(path, dir_fd=None):
        at = {} if dir_fd is None else {"src_dir_fd" if first else "dst_dir_fd": dir_fd}
        if first:
            clear(other + "/moved")
            return function(path, other + "/moved", **at)
        with open(other + "/inside", "w") as file:
            file.write("inside")
        return function(other + "/inside", path, **at)

    return call


def linked_to(path, dir_fd=None):
    """A link whose target is the way out, and what is read through it. A guest can't make one to an absolute path: with a
    descriptor, in whose directory it's made, the target is relative."""
    where = {} if dir_fd is None else {"dir_fd": dir_fd}
    link = "through" if where else other + "/through"
    try:
        os.unlink(link, **where)
    except OSError:
        pass
    os.symlink(path, link, **where)
    return opener(READ)(link, **where)


def chdir(path):
    os.chdir(path)
    try:
        return os.listdir(".")
    finally:
        os.chdir("/")


def copied(path):
    with open(shutil.copyfile(path, "/tmp/copied"), "rb") as file:
        return file.read()


READ, WRITE, MAKE = os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT
# Name, call; what a good path is, and how the work shows there: by what is read, by the names in a directory, by a change, or
# by an answer; whether it acts on a link itself when that is the last part of a path; whether it takes a descriptor to begin at.
FUNCTIONS = [
    Function("open", opener(READ), "file", "read"),
    Function("open write", opener(WRITE, reads=False, writes=True), "file", "change"),
    Function("open append", opener(os.O_RDWR | os.O_APPEND, writes=True), "file", "change"),
    Function("open create", opener(MAKE, reads=False, writes=True), "nothing", "change"),
    Function("open create read", opener(READ | os.O_CREAT), "nothing", "change"),
    Function("open exclusive", opener(MAKE | os.O_EXCL, reads=False, writes=True), "nothing", "change"),
    Function("open truncate", opener(READ | os.O_TRUNC), "file", "change"),
    Function("open truncate write", opener(WRITE | os.O_TRUNC, reads=False, writes=True), "file", "change"),
    Function("open create truncate", opener(MAKE | os.O_TRUNC, reads=False, writes=True), "file", "change"),
    Function("open directory", directory_opener(False), "directory", "read"),
    Function("open directory make", directory_opener(True), "directory", "change"),
    Function("open nofollow", opener(READ | os.O_NOFOLLOW), "file", "read"),
    Function("stat", os.stat, "file", "answer"),
    Function("stat nofollow", lambda path, **at: os.stat(path, follow_symlinks=False, **at), "link", "answer", True),
    Function("lstat", os.lstat, "link", "answer", True),
    Function("access", lambda path, **at: os.access(path, os.F_OK, **at) or fail(), "file", "answer"),
    Function("readlink", os.readlink, "link", "answer", True),
    Function("listdir", os.listdir, "directory", "names", at=False),
    Function("scandir", lambda path: [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(path)], "directory", "names", at=False),
    Function("mkdir", os.mkdir, "nothing", "change"),
    Function("rmdir", os.rmdir, "empty", "change", True),
    Function("unlink", os.unlink, "file", "change", True),
    Function("remove", os.remove, "file", "change", True),
    Function("utime", lambda path, **at: os.utime(path, (1, 1), **at), "file", "change"),
    Function("utime nofollow", lambda path, **at: os.utime(path, (1, 1), follow_symlinks=False, **at), "link", "change", True),
    Function("truncate", lambda path: os.truncate(path, 0), "file", "change", at=False),
    Function("chdir", chdir, "directory", "names", at=False),
    Function("copy", copied, "file", "read", at=False),
    Function("symlink", lambda path, **at: os.symlink("x", path, **at), "nothing", "change"),
    # A link that is renamed or replaced goes by itself.
    Function("rename from", two(os.rename, True), "file", "change", True),
    Function("rename to", two(os.rename, False), "file", "change", True),
    Function("replace from", two(os.replace, True), "file", "change", True),
    Function("replace to", two(os.replace, False), "nothing", "change", True),
    Function("link from", two(os.link, True), "file", "moved", True, at=False),
    Function("link to", two(os.link, False), "nothing", "change", True, at=False),
    Function("link through", linked_to, "file", "read"),
]
REMOVING = ("rmdir", "unlink", "remove", "rename", "replace")
# They fail through a directory that the guest has opened itself: with that come the rights to it, which are to read.
NOT_THROUGH_OWN = ("open write", "open append")
# They answer the same for any path, and ask nobody; and those that are only about a path's text.
HOLLOW = {
    "chmod": (0o100,),  # WASI has no modes.
    "pathconf": ("PC_NAME_MAX",),  # A constant of the C library.
}
TEXT = {"fspath", "_path_normpath", "_path_splitroot_ex"}
# What CPython has for paths elsewhere, by what it is that WASI has not.
ABSENT = {
    "owners and modes": "chown lchown fchown lchmod fchmod umask chflags lchflags",
    "roots and mounts": "chroot setns unshare statvfs fstatvfs",
    "pipes, devices and memory as files": "mkfifo mknod memfd_create",
    "attributes of files": "getxattr setxattr listxattr removexattr",
    "a current directory by descriptor": "fchdir",
    "copies by the kernel": "copy_file_range splice sendfile",
    "programs": "execv execve posix_spawn posix_spawnp spawnv system startfile",
}
# All lead out. The host has put the first ones into the mounts; those that are `made` the guest makes, there and in `/tmp`.
FAR = "../" * 40 + HOST[1:]
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
    "made_down": "sub/../../bait/secret",
    "made_dots": ".//.././bait/./inner/../secret",
    "made_chain": "made_up/secret",
    "made_far": FAR + "/bait",
    "made_far_file": FAR + "/bait/secret",
    "sub/made": "../../bait/secret",
    "sub/made_far": FAR + "/bait/new",
}
MADE = [name for name in LINKS if "made" in name]


def look(path):
    """All that a function may change of a path."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if stat.S_ISDIR(found.st_mode):
        content = sorted(os.listdir(path))
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    else:
        with open(path, "rb") as file:
            content = file.read()
    return found.st_mode, found.st_size, found.st_mtime_ns, content


def clear(path):
    """Nothing is there afterwards."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def lay(path, kind):
    """Lays what a function needs at a path inside."""
    clear(path)
    if kind == "file":
        with open(path, "wb") as file:
            file.write(PLAIN)
    elif kind == "link":
        os.symlink("plain", path)
    elif kind != "nothing":
        os.mkdir(path)
        if kind != "empty":
            lay(path + "/plain", "file")


def good_name(root, function):
    """The name of a good path in a directory, or `None` where there can't be one."""
    if root == other:
        return "good"
    if function.proof in ("change", "moved") or function.call is linked_to:
        return None  # Only to be read.
    names = {"file": "plain", "directory": ".", "link": "up"} if root == "/data" else {}
    return names.get(function.good)


def control(root, fd, own):
    """Calls each function on a good path, and sees that it did its work."""
    for function in FUNCTIONS:
        name = good_name(root, function)
        if name is None:
            continue
        for at in ({}, {"dir_fd": fd}, {"dir_fd": own}) if function.at else ({},):
            may_work = own not in at.values() or function.name not in NOT_THROUGH_OWN
            path = root + "/" + name
            if root == other:
                lay(path, function.good)
            clear(other + "/moved")
            before = look(path)
            named = name if at or function.call is linked_to else path
            try:
                found = function.call(named, **at)
            except Exception as error:
                if may_work:
                    idle.append("%s %r %r: %r" % (function.name, path, at, error))
                continue
            works = {
                "read": lambda: PLAIN in found,
                "names": lambda: b"plain" in repr(found).encode(),
                "change": lambda: look(path) != before,
                "moved": lambda: look(other + "/moved")[3] == PLAIN,
                "answer": lambda: bool(found),
            }[function.proof]()
            if not works or not may_work:
                idle.append("%s %r %r does other work: %r" % (function.name, path, at, found))
            stats["controls"] += 1
    for name in ("good", "moved", "inside", "through"):
        clear(other + "/" + name)


def uncovered():
    """Functions for paths that are none of those here, or that are and should not be."""
    named = {function.name.split()[0] for function in FUNCTIONS}
    for name in dir(posix):
        signature = getattr(getattr(posix, name), "__text_signature__", None) or ""
        if re.match(r"\(\$module, (path|src)\b", signature) and name not in named | TEXT | set(HOLLOW):
            yield name
    for name, arguments in HOLLOW.items():
        with open("/tmp/hollow", "w"):
            before = look("/tmp/hollow")
        answers = {getattr(os, name)(path, *arguments) for path in ("/tmp/hollow", "/nowhere/at/all", HOST + "/bait/secret")}
        if len(answers) != 1 or look("/tmp/hollow") != before:
            yield name + " does something"
    os.unlink("/tmp/hollow")
    for what, names in ABSENT.items():
        yield from ("%s (%s) is there" % (name, what) for name in names.split() if hasattr(os, name))


def ways(root, links):
    """Paths that lead out, and the link that is their last part. `root` may be empty: then they are relative."""
    out = ["bait", "bait/secret", "bait/inner", "bait/empty", "bait/link", "bait/new"]
    up = root + "/" if root else ""
    for to in out:
        for prefix in ("../", "sub/../../", "./../", "sub/./../.././", "..//", "none/../../", "sub/up/../"):
            yield up + prefix + to, None
        yield up + FAR + "/" + to, None
    for to in ("secret", "inner", "empty", "link", "new"):
        for link in ("up", "chain", "sub/up", "made_up", "made_far"):
            yield up + link + "/" + to, None
    for link in links:
        for end in ("", "/", "/."):
            yield up + link + end, link
    yield up + "..", None
    yield up + "../", None
    yield up + "../none", None


def absolute_ways():
    for to in ("bait", "bait/secret", "bait/inner", "bait/new"):
        for prefix in ("", "/", "//", "/.", "/..", "/../..", "/proc/self/root", "/proc/1/root", "/proc/self/cwd/../../../.."):
            yield prefix + HOST + "/" + to
    for path in ("/etc/passwd", "/etc", "/root", "/home", "/proc/self/environ", "/proc/self/fd/3", "/dev/fd/4/..", "/dev/null"):
        yield path
    for path in ("/usr/local/lib/../../../etc/passwd", "/tmp/../etc/passwd", "/tmp/../../..", "..", "../..", "/.."):
        yield path


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


def attempt(name, function, path, may_act, odd=False, **at):
    """An odd name is none to Python itself, or a good one inside, so that only leaks count."""
    stats["tried"] += 1
    try:
        found = function(path, **at)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not odd:
            raise
        stats["refused"] += 1
        kind = errno.errorcode.get(error.errno) if isinstance(error, OSError) else type(error).__name__
        counts[kind] = counts.get(kind, 0) + 1
        return
    stats["done"] += 1
    if MARK in (found if isinstance(found, bytes) else repr(found).encode("utf-8", "surrogateescape")):
        note(name + " read", path, found)
    elif not may_act and not odd:
        note(name + " did", path, found)


def mend(root, name):
    """Makes a link again that a function took away or replaced, which those that act on links may."""
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


def can_be_mended(name):
    """A guest can't make a link to an absolute path."""
    return not LINKS[name].startswith("/")


def try_all(paths, root, removing=False, **at):
    functions = [function for function in FUNCTIONS if function.at or not at]
    for path, link in paths:
        for function in functions:
            if link and root == other:
                mend(root, link)
                if not can_be_mended(link) and function.name.startswith(REMOVING) != removing:
                    continue  # What takes them away comes at the end.
            attempt(function.name, function.call, path, bool(link) and function.on_link, **at)


uncovered = list(uncovered())
for root, fd, other in ROOTS:
    if root == "/tmp":
        os.mkdir("/tmp/sub")
    links = {"/data": [name for name in LINKS if name not in MADE], "/output": LINKS, "/tmp": MADE}.get(root, ())
    for name in links:
        mend(root, name)
    own = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    control(root, fd, own)
    try_all(ways(root, links), root)
    for at in (fd, own):
        try_all(ways("", links), root, dir_fd=at)
    try_all([(path, None) for path in absolute_ways()], root, dir_fd=fd)
    os.close(own)
    for path in odd_ways(root):
        for function in FUNCTIONS:
            attempt(function.name, function.call, path, False, odd=True)
try_all([(path, None) for path in absolute_ways()], "/")
# Descriptors that a session begins with, those that it hasn't, and negative ones.
for fd in [*range(65), -1, -2, 2**31 - 1]:
    other = "/output" if fd in (6, 7) else "/tmp"
    for path in ("../bait/secret", HOST[1:] + "/bait/secret", FAR + "/bait/secret", "up/secret", "sub/up/secret"):
        for function in FUNCTIONS:
            if function.at:
                attempt(function.name, function.call, path, False, dir_fd=fd)
other = "/output"
absolute = [(other + "/" + name, name) for name in LINKS if not can_be_mended(name)]
try_all(absolute, other, removing=True)
found = {"leaks": leaks[:40], "count": len(leaks), "idle": idle, "uncovered": uncovered, **stats, "kinds": counts}
print(json.dumps(found))
