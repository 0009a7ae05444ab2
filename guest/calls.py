"""What the guest asks the host: the channel, soft stops, model calls and tools.

A call is a frame to the host and one back. What most calls of models are, one text there and one back, has frames that
are a tag and the text (`PROMPT` and `TEXT` in `values`):

    L prompt    llm_query(prompt)          T text      the answer
    R prompt    rlm_query(prompt)          (empty)     the answer is in the mailbox

Every other frame has a header: `{"op": "lm"}` (several prompts, messages, a model's name), `{"op": "tool"}` and
`{"op": "why"}`, the question after a soft stop. What is answered to any call is one text, or has a header, too.
"""

import builtins

from .values import PROMPT, TEXT, TEXT_CHARS_MAX, Body, NotRepresentable, decode, encode, pack, type_name, unpack

PIECES_BYTES_MIN = 16 * 1024  # Shorter bodies are sent quicker than described.
PIECES_MAX = 64
_len, _str, _type, _issubclass, _list, _dict, _tuple, _id = len, str, type, issubclass, list, dict, tuple, id
_map, _TEXTS = map, frozenset((str,))
_EXCEPTIONS = {
    name: value
    for name, value in vars(builtins).items()
    if _type(value) is type and _issubclass(value, Exception)
}


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
        self.is_elsewhere = None  # Where there are threads: whether this is another one than that of the cells.

    def exchange(self, frame):
        """One call: the reply's header and body. A reply that is one text has no header: None and the text."""
        if self.is_elsewhere is not None and self.is_elsewhere():
            reply = self.call(frame)  # Soft stops are for the thread of the cells.
            return (None, reply[1:].decode()) if reply[:1] == TEXT else unpack(reply)
        self.busy = True
        try:
            reply = self.call(frame)
            while reply[:1] != TEXT:
                header, data = unpack(reply)
                if "op" not in header:
                    break
                reply = self.call(self.answer(header, data))  # The host reads variables while its own tool runs.
            else:
                header, data = None, reply[1:].decode()
        finally:
            self.busy = False
        if self.deferred:
            self.stop()
        return header, data

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
        if self.busy or not self.watching:
            self.deferred = True  # A second frame now would break the alternation; or the cell has yet to begin.
        else:
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
        self.tasks = None  # The threads shim's scheduler, where there are no threads: it joins the calls of many tasks.

    def query(self, kind, prompt, model):
        if _type(prompt) is _str:
            tasks = self.tasks
            # What `ask` would do, in fewer steps.
            if model is None and self.available and (tasks is None or not (tasks.queue or tasks.waiting)):
                return self.send_text(kind, prompt)
        else:
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
        if _are_texts(prompts):
            return self.ask(kind, prompts, model, True)
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
        if self.tasks is not None:
            return self.tasks.ask(kind, prompts, model, batched)
        return self.send(kind, prompts, model, batched)

    def send(self, kind, prompts, model, batched):
        """One crossing; as many responses as prompts."""
        if model is None and not batched and _len(prompts) == 1 and _type(prompts[0]) is _str:
            return [self.send_text(kind, prompts[0])]
        return self.send_encoded(kind, prompts, model, batched)

    def send_text(self, kind, prompt):
        """One crossing with one text."""
        if _len(prompt) >= PIECES_BYTES_MIN and prompt.isascii():
            body = Body()
            body.add(prompt)
            return self.cross({"op": "lm", "kind": kind}, body, 1)[0]
        try:
            frame = PROMPT[kind] + prompt.encode()
        except UnicodeEncodeError:  # A lone surrogate.
            return self.send_encoded(kind, [prompt], None, False)[0]
        try:
            header, data = self.channel.exchange(frame)
            return data if header is None else self.responses(header, data, 1)[0]
        except Exception as error:
            return self.failed(error, 1)[0]

    def send_encoded(self, kind, prompts, model, batched):
        body, encoded, bad = Body(), [], {}
        if _are_texts(prompts) and max(_map(_len, prompts)) <= TEXT_CHARS_MAX and all(_map(_str.isascii, prompts)):
            encoded, prompts = prompts, ()  # They are what `encode` would make of them.
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
            responses = self.cross(header, body, _len(encoded))
        if bad:
            good = iter(responses)
            responses = [bad[index] if index in bad else next(good) for index in range(_len(prompts))]
        return responses

    def cross(self, header, body, count):
        try:
            return self.responses(*self.channel.ask(header, body), count)
        except Exception as error:
            return self.failed(error, count)

    def responses(self, header, data, count):
        """What the host's reply says; raises if it says something else."""
        if not header and count == 1:
            return [self.channel.take_letter() if header is not None else data]
        if header and header.get("error") is not None:
            if self.raises:
                raise RuntimeError(header["error"])
            return ["Error: " + header["error"]] * count
        responses = header.get("responses") if header else None
        if _type(responses) is not _list or _len(responses) != count:
            raise RuntimeError("the host answered %s prompts with something else" % count)
        if _are_texts(responses):
            return responses
        return ["" if response is None else response for response in decode(responses, data)]

    def failed(self, problem, count):
        if self.raises:
            raise problem if _issubclass(_type(problem), RuntimeError) else RuntimeError(_str(problem))
        return ["Error: LM query failed - %s" % (problem,)] * count


def _are_texts(values):
    """Whether all of a list are exactly str: then nothing of it has to be looked at one by one."""
    return {*_map(_type, values)} == _TEXTS


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
        if not reply:
            return channel.take_letter() if reply is not None else data
        if reply.get("error") is not None:
            raise _exception(reply.get("type"), reply["error"])
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
