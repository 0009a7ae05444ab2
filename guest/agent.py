"""The guest agent: one turn of the channel, and the requests of the host.

The host starts a turn; the agent asks for a request ("next"), answers it ("done", which asks for the next one), and the
turn ends with an empty frame. Code of the cells runs only inside `Agent.guarded` and `Agent.run`, where a soft stop may
raise. Nothing that such code raises leaves the agent, and what it replaces is put back after the cell (`repairs`).
"""

import builtins
import gc
import keyword
import linecache
import os
import sys

from .calls import Channel, LimitReached, Models, make_tool
from .cells import VALUE, Sources, compile_cell, cut_middle, format_exception, plain_traceback, stored_names
from .freeze import Survey, fill_holes, gather
from .imports import ImportGuard
from .namespace import LIST_MAX, REPORT_MAX, Namespace, describe
from .profiles import PROFILES, json_text, openenv_final
from .repairs import Repairs
from .streams import Streams
from .values import TEXT_CHARS_MAX, UNREPRESENTABLE, Body, NotRepresentable, decode, encode, loads, pack, short_name
from .values import short_repr, to_utf8, type_name, unpack

VALUE_CHARS = 8192
REPR_CHARS = 500
MESSAGE_CHARS_MAX = 64 * 1024
ANSWER_BYTES_MAX = 64 << 20  # The host takes no more.
_exec, _eval, _len, _str, _type, _int, _bytes = exec, eval, len, str, type, int, bytes
_issubclass, _import, _min = issubclass, __import__, min
_modules = sys.modules
_FAILED = pack({"op": "done", "error": "the agent failed and could not say why"})
_FULL = pack({"op": "done", "error": "MemoryError: the memory is full"})  # There may be no room to write it then.
_COMPLETED = {"outcome": "completed"}  # What most cells end with: its frame need not be written each time.
_COMPLETED_FRAME = pack({"op": "done", **_COMPLETED})
_NEXT = pack({"op": "next"})
turn = None  # Set by `install`.


class Agent:
    """The state of one guest."""

    def __init__(self, call, module, shims):
        self.channel = Channel(call)
        self.channel.answer = self.answer_host
        self.models = Models(self.channel)
        self.namespace = Namespace(module)
        self.sources = Sources()
        self.streams = Streams()
        self.imports = ImportGuard(module.__dict__)
        self.scheduler = None
        self.echo = None
        self.found = None  # The survey, while an image is being built.
        self.filling = None
        self.settled = {}
        self.samples = []
        self.reported = False  # Whether code of the cell ran after the cell, for its report.
        self.value_chars, self.repr_chars = VALUE_CHARS, REPR_CHARS
        self.operations = {
            "configure": self.configure,
            "set": self.set,
            "context": self.context,
            "history": self.context,
            "get": self.get,
            "vars": self.vars,
            "tools": self.tools,
            "exec": self.execute,
            "setup": self.setup,
            "reset": self.reset,
            "preload": self.preload,
            "gather": self.gather,
            "survey": self.survey,
            "freeze": self.freeze,
        }
        if shims:
            self.activate_shims()
        builtins.LimitReached = LimitReached
        builtins.__kaa_turn__ = self.turn
        # What a host in the same address space evaluates for a turn, without compiling anything.
        self.entry = compile("turn()", "<kaa>/turn", "eval"), {"turn": self.turn, "__builtins__": {}}
        self.repairs = Repairs(module, self.streams, self.channel.interrupted)
        self.use_profile("rlm")
        self.namespace.reset()

    def activate_shims(self):
        """Threads and asyncio for a platform without threads and sockets. They import much: image build only."""
        from . import loop, threads

        self.scheduler = threads.activate(self.models.send)
        self.models.tasks = self.scheduler
        loop.activate(self.scheduler.run_one)

    # --- turns ---

    def turn(self):
        """Serves requests until the host ends the turn. Never raises, always returns None."""
        call = self.channel.call
        try:
            try:
                request = call(_NEXT)
                while request:
                    request = call(self.handle(request))
            except MemoryError:
                call(_FULL)  # For the request that didn't fit.
        except BaseException:
            pass  # The host is gone, or refuses: there is nobody to tell.

    def handle(self, frame):
        """The reply to one request, as a frame."""
        try:
            header, data = unpack(frame)
            operation = self.operations.get(header.get("op"))
            if operation is None:
                raise ValueError("unknown request %s" % header.get("op"))
            reply, body = operation(header, data)
            if reply is _COMPLETED:
                return _COMPLETED_FRAME
            reply["op"] = "done"
            return pack(reply, body.join() if body is not None else b"")
        except BaseException as error:
            self.channel.watching = False
            return _failure(error)

    def answer_host(self, header, data):
        """A request that arrives while a call of the cell is open: only what does not run a cell."""
        watching, self.channel.watching = self.channel.watching, False
        busy, self.channel.busy = self.channel.busy, True
        try:
            if header.get("op") not in ("get", "vars", "set"):
                return pack({"op": "done", "error": "%s must wait for the end of the cell" % header.get("op")})
            return self.handle(pack(header, _bytes(data)))
        finally:
            self.channel.watching, self.channel.busy = watching, busy

    def guarded(self, fallback, function, *args):
        """Calls what may run code of the cell; a soft stop or any exception gives the fallback."""
        channel = self.channel
        outer, self.reported = channel.watching, True
        try:
            try:
                channel.watching = not channel.busy
                return function(*args)
            finally:
                channel.watching = outer
        except BaseException:
            channel.watching = outer
            return fallback

    # --- requests about the session ---

    def configure(self, header, data):
        seed = header.get("seed")
        if seed:
            _seed(bytes.fromhex(seed))
        if header.get("env"):
            # Read once, when the image was booted: what this session was granted came later.
            os.environ.update(header["env"])
        if header.get("recursion"):
            sys.setrecursionlimit(header["recursion"])
        self.value_chars = header.get("value_chars", self.value_chars)
        self.repr_chars = header.get("repr_chars", self.repr_chars)
        echo = header.get("expr", "profile")
        if echo not in ("profile", "silent", "json", "repr"):
            raise ValueError("unknown expr %s" % echo)
        self.echo = None if echo == "profile" else echo
        name, available = header.get("profile", self.profile.name), header.get("lm", self.models.available)
        # An image usually has the right profile already, and defining the globals again would only dirty memory.
        changed, self.models.available = available != self.models.available, available
        if name != self.profile.name or (changed and self.profile.needs_models):
            self.use_profile(name)
        allowed = header["allowed_imports"] if "allowed_imports" in header else self.profile.imports
        if allowed != self.imports.allowed:
            self.imports.allow(allowed)
            self.repairs.remember()
        if "tools" in header:
            self.tools(header, data)
        return {}, None

    def use_profile(self, name):
        profile = PROFILES.get(name)
        if profile is None:
            raise ValueError("unknown profile %s; known are %s" % (name, ", ".join(sorted(PROFILES))))
        self.profile = profile
        self.models.raises = profile.lm_raises
        self.namespace.define(profile.functions(self))

    def tools(self, header, _data):
        names = [tool["name"] for tool in header["tools"]]
        self.namespace.set_tools({name: make_tool(self.channel, name) for name in names})
        return {}, None

    def reset(self, _header, _data):
        self.namespace.reset()
        return {}, None

    def set(self, header, data):
        name = header.get("name")
        if _type(name) is not _str or not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError("%r is not the name of a variable" % (name,))
        if self.namespace.is_reserved(name) or (name.startswith("__") and name.endswith("__")):
            raise ValueError("the name %r is reserved" % name)
        letter = header.get("letter")
        self.namespace.names[name] = self.channel.take_letter() if letter else decode(header.get("value"), data)
        return {}, None

    def context(self, header, data):
        kind = header["op"]
        if header.get("letter"):
            data = self.channel.take_letter()
        value = _read_context(header.get("kind", "json" if kind == "history" else "text"), data)
        return {"index": self.namespace.add(kind, header.get("index"), value)}, None

    def get(self, header, _data):
        name, missing, body = header.get("name"), self.namespace, Body()
        value = self.namespace.names.get(name, missing)
        if value is missing:
            return {"found": False}, None
        encoded = self.guarded(None, _try_encode, value, body)
        if encoded is not None:
            return {"found": True, "value": encoded[0]}, body
        text = self.guarded(UNREPRESENTABLE, short_repr, value, self.repr_chars)
        return {"found": True, "unrepresentable": type_name(value), "repr": text}, None

    def vars(self, _header, _data):
        """The variables, without running code of the cells: nobody who asks for names expects to wait for it."""
        found = [*self.namespace.variables().items()][:LIST_MAX]
        return {"variables": [describe(name, value, self.repr_chars, False) for name, value in found]}, None

    # --- requests at image build ---

    def preload(self, header, _data):
        failed = []
        for name in header["imports"]:
            try:
                _import(name)
            except BaseException as error:
                failed.append([name, "%s: %s" % (type_name(error), self.guarded("", _str, error))])
        self.repairs.restore()
        return {"failed": failed}, None

    def gather(self, header, _data):
        """Puts the code side by side that ran since the last time; some of it for good."""
        self.clean()
        filling, new = fill_holes(), gather(self.settled)
        if header.get("settle"):
            self.settled.update(new)
        del filling
        return {}, None

    def survey(self, _header, _data):
        """Names the addresses of a batch of objects, which the host then makes immortal; an empty one is the last."""
        if self.found is None:
            self.clean()
            self.found = Survey()
        body, addresses = Body(), self.found.next()
        if addresses:
            body.add(addresses)
        else:
            self.found = None
        return {}, body

    def clean(self):
        """Leaves only what every session needs."""
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            sys.__dict__.pop(name, None)
        self.sources.clear()
        linecache.clearcache()
        self.repairs.restore()
        gc.collect()
        gc.collect()

    def freeze(self, header, _data):
        """The last thing before the memory is saved.

        The answer names the addresses (`id` in CPython) of what the host uses: the code object of a turn, its globals,
        the mailbox, and texts of every width and bytes, by which it finds out how they lie in memory.
        """
        self.filling = None
        self.clean()
        self.filling = fill_holes()
        gc.freeze()
        code, names = self.entry
        self.samples = header.get("samples", [])
        self.samples += [text.encode() for text in self.samples[:1]]
        self.channel.layout = header.get("layout")
        addresses = {"code": id(code), "names": id(names), "mailbox": id(self.channel.mailbox)}
        return {**addresses, "samples": [*map(id, self.samples)]}, None

    # --- cells ---

    def execute(self, header, data):
        return self.cell(data, "<cell %s>" % header.get("cell"), self.profile, self.echo or self.profile.echo)

    def setup(self, header, data):
        return self.cell(data, header.get("filename", "<setup>"), self.profile, None)

    def cell(self, source, filename, profile, echo):
        """Runs one cell; the reply's header."""
        namespace, channel = self.namespace, self.channel
        channel.limit = None  # A stop that is deferred by now is this cell's: its limits hold from the turn's start on.
        self.reported = False
        if profile.copies_output:
            self.streams.keep_copy()
        namespace.begin()
        code, value, error = self.run(_bytes(source), filename, profile.assignments and echo is not None)
        self.repairs.restore()
        reply = {"outcome": "completed"}  # What it doesn't name is nothing.
        if error is not None:
            self.report_error(error, reply)
        elif value is not None and echo is not None:
            self.report_value(value, echo, reply)
        output = self.streams.take_copy() if profile.copies_output else ""
        stored = stored_names(code) if code is not None else ()
        intact = namespace.unchanged()
        submitted = namespace.restore_answer() if intact else namespace.restore()
        if stored or not intact or namespace.sizes:
            reply["variables"] = self.report_variables(stored)
        answer, body = self.final_answer(submitted, output), None
        if answer is not None:
            body = Body()
            reply["final_answer"] = self.send_answer(answer, body)
        if channel.limit is not None:
            reply["limit"] = channel.limit
        if self.reported:
            # What the report ran (a `__repr__`) may have broken things again.
            self.repairs.stop_tracing()
            self.repairs.restore()
            namespace.restore()
        namespace.forget()
        if _len(reply) == 1 and reply["outcome"] == "completed":
            return _COMPLETED, None
        return reply, body

    def run(self, source, filename, assignments):
        """Compiles and executes; the code, if it compiled, the last value, and the exception, if one came out."""
        channel, names, code, value = self.channel, self.namespace.names, None, None
        try:
            try:
                channel.watching = True
                if channel.deferred:
                    channel.stop()
                code, is_expression = compile_cell(source, filename, self.sources, assignments)
                if is_expression:
                    value = _eval(code, names)
                else:
                    _exec(code, names)
                    value = names.pop(VALUE, None)
                if self.scheduler is not None:
                    self.scheduler.drain()
            finally:
                channel.watching = False
                self.repairs.stop_tracing()
        except BaseException as error:
            channel.watching = False
            self.repairs.stop_tracing()
            names.pop(VALUE, None)
            if self.scheduler is not None:
                self.finish_tasks(error)
            return code, None, error
        return code, value, None

    def finish_tasks(self, error):
        """A cell that raised still has threads: they end as they would have, unless the cell was stopped."""
        if self.channel.limit is None and _issubclass(_type(error), Exception):
            self.guarded(None, self.scheduler.drain)
        self.scheduler.abandon()

    # --- the report of a cell ---

    def report_error(self, error, reply):
        """How the cell ended, if not by itself; also written to stderr."""
        kind = type_name(error)
        if _issubclass(_type(error), SystemExit):
            reply["outcome"] = "exited"
            code = self.guarded(1, getattr, error, "code")
            text = self.guarded(UNREPRESENTABLE, _str, code)
            reply["exit_code"] = 0 if code is None else _exit_code(code)
            self.streams.write_error("SystemExit: %s\n" % text)
            return
        reply["outcome"] = "raised"
        message = self.guarded("<exception str() failed>", _message, error)
        text = self.guarded(None, format_exception, error, self.sources)
        if text is None:
            text = self.guarded("%s: %s\n" % (kind, message), plain_traceback, error, message)
        reply["exception"] = {"type": kind, "message": message, "traceback": text}
        if self.profile.name == "openenv":
            text = "%s: %s\n%s" % (kind, message, text)
        self.streams.write_error(text)

    def report_value(self, value, echo, reply):
        user_code = self.channel.limit is None
        reply["value"] = self.guarded(UNREPRESENTABLE, short_repr, value, self.value_chars, user_code)
        if echo == "silent" or not user_code:
            return
        text = self.guarded(None, json_text if echo == "json" else repr, value)
        self.guarded(None, self.print_value, UNREPRESENTABLE if text is None else text)

    def print_value(self, text):
        out = self.streams.out
        copy = out.buffer.copy
        out.write("\n" + text + "\n" if copy and not copy[-1].endswith(b"\n") else text + "\n")

    def report_variables(self, stored):
        rows = []
        for name, value, new in self.namespace.changed(stored)[:REPORT_MAX]:
            row = self.row(name, value)
            row["new"] = new
            rows.append(row)
        return rows

    def row(self, name, value):
        user_code = self.channel.limit is None
        row = self.guarded(None, describe, name, value, self.repr_chars, user_code)
        return row or {"name": short_name(name), "type": type_name(value), "repr": UNREPRESENTABLE}

    def final_answer(self, submitted, output):
        if self.profile.level:
            found = self.guarded(None, openenv_final, output, self.namespace)
            if found is not None:
                return _str.__str__(found)
            submitted = self.guarded(False, bool, dict.get(self.namespace.answer, "ready"))
        if not submitted:
            return None
        return self.guarded(UNREPRESENTABLE, _text, dict.get(self.namespace.answer, "content", ""))

    def send_answer(self, answer, body):
        """The answer's form in the header; a long one goes to the body, and what is too long is cut."""
        if _len(answer) <= TEXT_CHARS_MAX:
            return answer
        data = to_utf8(answer[:ANSWER_BYTES_MAX])
        end = _len(data)
        if _len(answer) > ANSWER_BYTES_MAX or end > ANSWER_BYTES_MAX:
            end = _min(end, ANSWER_BYTES_MAX)
            while end < _len(data) and data[end] & 0xC0 == 0x80:  # Not in the middle of a character.
                end -= 1
            data = data[:end]
            self.streams.write_error(
                "The final answer has %d characters; only its first %d bytes are kept. "
                "Submit a shorter one, and leave what is long in variables or files.\n" % (_len(answer), end)
            )
        return {"$str": body.add(data)}


def _text(value):
    """`str(value)` as an exact str."""
    return _str.__str__(_str(value))


def _message(error):
    return cut_middle(_text(error), MESSAGE_CHARS_MAX)


def _exit_code(code):
    return _int.__int__(code) if _issubclass(_type(code), _int) and -(2**31) <= code < 2**31 else 1


def _try_encode(value, body):
    """In a list, because the encoding of None is None."""
    try:
        return [encode(value, body)]
    except NotRepresentable:
        return None


def _failure(error):
    """The reply for a request that the agent could not serve."""
    if _issubclass(_type(error), MemoryError):
        return _FULL
    try:
        message = _text(error)
        if not _issubclass(_type(error), ValueError):
            message = "%s: %s" % (type_name(error), message)
        return pack({"op": "done", "error": cut_middle(message, MESSAGE_CHARS_MAX)})
    except MemoryError:
        return _FULL
    except BaseException:
        return _FAILED


def _read_context(kind, data):
    """A context from its bytes or its text; errors name the byte where it is wrong."""
    if kind == "bytes":
        return _bytes(data)
    try:
        text = data if _type(data) is _str else _str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise ValueError("the context is not UTF-8 at byte %d" % error.start) from None
    if kind == "text":
        return text
    if kind != "json":
        raise ValueError("unknown kind of context %s" % kind)
    try:
        return loads(text)
    except ValueError as error:
        at = _len(text[: getattr(error, "pos", 0)].encode("utf-8", "surrogatepass"))
        raise ValueError("the context is not JSON at byte %d: %s" % (at, error)) from None


def _seed(seed):
    """Sessions made from one image must not share their random numbers."""
    if "random" in _modules:
        _modules["random"].seed(_int.from_bytes(seed, "big"))  # Quicker than bytes, which are hashed first.
    if "numpy" in _modules and hasattr(_modules["numpy"], "random"):
        words = [_int.from_bytes(seed[at : at + 4], "big") for at in range(0, _len(seed), 4)]
        _modules["numpy"].random.seed(words)


def install(call, shims=None):
    """Makes this process a guest: `call` carries a frame to the host and returns its answer.

    Leaves in `__main__` what a fresh cell sees, and the turn in `kaa_agent.agent.turn` and as the builtin
    `__kaa_turn__`, which the constant line `__kaa_turn__()` finds also after a cell replaced `sys.modules`. `shims`
    forces the stand-ins for threads and asyncio on or off; by default they are used on WASI.
    """
    global turn
    shims = sys.platform == "wasi" if shims is None else shims
    agent = Agent(call, _modules["__main__"], shims)
    turn = agent.turn
    return agent
