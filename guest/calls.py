"""What the guest asks the host: the channel, soft stops, model calls and tools."""

import builtins

from .values import Body, NotRepresentable, decode, encode, pack, type_name, unpack

PIECES_BYTES_MIN = 16 * 1024  # Shorter bodies are sent quicker than described.
PIECES_MAX = 64
_len, _str, _type, _issubclass, _list, _dict, _tuple, _id = len, str, type, issubclass, list, dict, tuple, id
_EXCEPTIONS = {
    name: value
    for name, value in vars(builtins).items()
    if _type(value) is type and _issubclass(value, Exception)
}


# The frame of a single text, without the text: that is its body.
_PROMPT = {kind: pack({"op": "lm", "kind": kind}) for kind in ("llm", "rlm")}


class LimitReached(KeyboardInterrupt):
    """A limit of this cell was reached; `limit` names it.

    No `Exception`, so that a retry loop does not swallow it; a KeyboardInterrupt, because libraries know that one as
    "stop now" (an asyncio task, for one, keeps every other exception for whoever awaits it).
    """

    limit = None


LimitReached.__module__ = "builtins"  # It is one, for cells; and tracebacks then show the bare name.
LimitReached.__qualname__ = "LimitReached"


class Channel:
    """Frames to and from the host, and the soft stop that may arrive at any moment."""

    def __init__(self, call):
        self.call = call
        self.mailbox = [None]  # Here a host in the same address space leaves a text: a letter.
        self.layout = None  # If it can read objects, too: where the characters of a str begin, and those of bytes.
        self.busy = False
        self.deferred = False
        self.watching = False  # True only while code of the cell runs: then a soft stop may raise.
        self.limit = None  # The last limit raised in this turn.
        self.answer = None  # Answers the host's own requests while a call of the guest is open.

    def exchange(self, frame):
        """One call: the reply's header and body."""
        self.busy = True
        try:
            reply, data = unpack(self.call(frame))
            while "op" in reply:  # The host reads variables while its own tool runs.
                reply, data = unpack(self.call(self.answer(reply, data)))
        finally:
            self.busy = False
        if self.deferred:
            self.stop()
        return reply, data

    def ask(self, header, body):
        """A call with a body. What is long stays where it is, if the host can read it there."""
        if self.layout is None or body.size < PIECES_BYTES_MIN or _len(body.parts) > PIECES_MAX:
            return self.exchange(pack(header, body.join()))
        text_at, bytes_at = self.layout
        header["pieces"] = [
            (_id(part) + (text_at if _type(part) is _str else bytes_at), _len(part)) for part in body.parts
        ]
        return self.exchange(pack(header))

    def take_letter(self):
        """The text that came with the last frame."""
        mailbox = self.mailbox
        text, mailbox[0] = mailbox[0], None
        if _type(text) is not _str:
            raise RuntimeError("the text that the host left is gone")
        return text

    def interrupted(self, _signal, _frame):
        """The handler of SIGINT, which is how the host asks for a soft stop."""
        if self.busy:
            self.deferred = True  # A second frame now would break the alternation.
        elif self.watching:
            self.stop()

    def stop(self):
        """Asks why, and raises in the cell."""
        self.deferred = False
        if not self.watching:
            return
        try:
            reason = self.exchange(pack({"op": "why"}))[0]
        except Exception:
            return  # The host refuses to say; it still has the hard stop.
        limit = reason.get("limit")
        if limit is None:
            return
        self.limit = limit
        if limit == "interrupt":
            raise KeyboardInterrupt(reason.get("message") or "")
        error = LimitReached(reason.get("message") or limit)
        error.limit = limit
        raise error


class Models:
    """`llm_query` and its relatives."""

    def __init__(self, channel):
        self.channel = channel
        self.available = True
        self.raises = False  # Profile `openenv`: a failed call is an exception, elsewhere a string.
        self.gather = None  # The threads shim, where there are no threads: it joins the calls of many tasks.

    def query(self, kind, prompt, model):
        if _type(prompt) is not _str:
            problem = _prompt_problem(prompt)
            if problem:
                return self.failed(problem, 1)[0]
        return self.ask(kind, [prompt], model, False)[0]

    def query_batched(self, kind, prompts, model):
        if _issubclass(_type(prompts), (_str, bytes, bytearray, _dict)):
            return self.failed("prompts must be a list of prompts, not " + type_name(prompts), 1)
        try:
            prompts = [*prompts]
        except Exception as error:
            return self.failed("prompts must be a list of prompts: %s" % error, 1)
        if not prompts:
            return []
        problems = [*map(_prompt_problem, prompts)]
        if not any(problems):
            return self.ask(kind, prompts, model, True)
        good = [prompt for prompt, problem in zip(prompts, problems) if not problem]
        responses = iter(self.ask(kind, good, model, True) if good else ())
        return [self.failed(problem, 1)[0] if problem else next(responses) for problem in problems]

    def ask(self, kind, prompts, model, batched):
        if not self.available:
            if self.raises:
                raise RuntimeError("No LM handler configured")
            return ["Error: No LM handler configured"] * _len(prompts)
        if model is not None and not _issubclass(_type(model), _str):
            return self.failed("model must be a str or None, not " + type_name(model), _len(prompts))
        if self.gather is not None:
            return self.gather(kind, prompts, model, batched)
        return self.send(kind, prompts, model, batched)

    def send(self, kind, prompts, model, batched):
        """One crossing; as many responses as prompts."""
        if model is None and not batched and _len(prompts) == 1 and _type(prompts[0]) is _str:
            if prompts[0].isascii() and _len(prompts[0]) >= PIECES_BYTES_MIN:
                body = Body()
                body.add(prompts[0])
                return self.cross(1, self.channel.ask, {"op": "lm", "kind": kind}, body)
            try:
                frame = _PROMPT[kind] + prompts[0].encode()
            except UnicodeEncodeError:
                pass  # A lone surrogate.
            else:
                return self.cross(1, self.channel.exchange, frame)
        body, encoded, bad = Body(), [], {}
        for index, prompt in enumerate(prompts):
            mark = _len(body.parts), body.size
            try:
                encoded.append(encode(prompt, body))
            except NotRepresentable as error:
                del body.parts[mark[0] :]
                body.size = mark[1]
                bad[index] = self.failed("the prompt cannot be sent: %s" % error, 1)[0]
        responses = []
        if encoded:
            header = {"op": "lm", "kind": kind, "prompts": encoded, "model": model, "batched": batched}
            responses = self.cross(_len(encoded), self.channel.ask, header, body)
        if bad:
            good = iter(responses)
            responses = [bad[index] if index in bad else next(good) for index in range(_len(prompts))]
        return responses

    def cross(self, count, ask, *call):
        try:
            reply, data = ask(*call)
            if not reply and count == 1:
                return [_str(data, "utf-8") if data else self.channel.take_letter()]  # The text alone.
            if reply.get("error") is not None:
                if self.raises:
                    raise RuntimeError(reply["error"])
                return ["Error: " + reply["error"]] * count
            responses = decode(reply.get("responses"), data)
            if _type(responses) is not _list or _len(responses) != count:
                raise RuntimeError("the host answered %s prompts with something else" % count)
        except Exception as error:
            return self.failed(error, count)
        return ["" if response is None else response for response in responses]

    def failed(self, problem, count):
        if self.raises:
            raise problem if _issubclass(_type(problem), RuntimeError) else RuntimeError(_str(problem))
        return ["Error: LM query failed - %s" % (problem,)] * count


def _prompt_problem(prompt):
    if _issubclass(_type(prompt), (_str, _list, _dict)):
        return None
    return "a prompt must be a str or a list of chat messages, not " + type_name(prompt)


def make_tool(channel, name):
    """The function `name` in cells: the host runs it."""

    def tool(*args, **kwargs):
        body = Body()
        try:
            header = {
                "op": "tool",
                "name": name,
                "args": [encode(arg, body) for arg in args],
                "kwargs": {key: encode(arg, body) for key, arg in kwargs.items()},
            }
        except NotRepresentable as error:
            raise TypeError("an argument of %s cannot be sent: %s" % (name, error)) from None
        reply, data = channel.ask(header, body) if body.parts else channel.exchange(pack(header))
        if reply.get("error") is not None:
            raise _exception(reply.get("type"), reply["error"])
        if "letter" in reply:
            return channel.take_letter()
        return decode(reply.get("value"), data)

    tool.__name__ = tool.__qualname__ = name
    tool.__doc__ = "%s(*args, **kwargs): a tool that the host runs. Arguments and result are JSON-like values." % name
    tool.__module__ = "__main__"
    return tool


def _exception(name, message):
    """The exception that a tool raised on the host, if it is a builtin one."""
    try:
        return _EXCEPTIONS.get(name, RuntimeError)(message)
    except Exception:  # UnicodeDecodeError and a few others want more arguments.
        return RuntimeError(message)
