"""A queue between code in a sandbox that asks language models and a host that answers, over HTTP.

A process of its own: `python3 -c SCRIPT` with Python 3.9 or newer and nothing else. The first line of stdin is a JSON
object with "host_token" and "guest_token", of 16 bytes or more each; "bind" and "port", by default 0.0.0.0 and 8080;
and any of `LIMITS`. It then prints one line, {"event": "listening", "port": PORT} or {"error": TEXT}, and ends when
its stdin ends. Requests and answers are those of RLM's broker, and more:

    GET /health            anyone  {"status": "ok"}
    POST /enqueue          guest   {"type", ..., "id"?, "timeout"?}; blocks for the object given to /respond
    GET /pending, or POST  host    {"pending": [{"id", "request", "timeout"}], "gone": [id]}
    POST /respond          host    {"id", "response": {...}, "poller"?}; {"status": "ok"}

Everything but /health needs `Authorization: Bearer TOKEN`. Each token opens only its own endpoints, so that cells can
neither read nor answer what others ask. Errors are {"error": TEXT, "code": WORD}.

/pending takes "wait" in seconds (0), "max" items (64), "poller" (any name), "held" (ids with commas between them or
a list) and "form": with "text", each request is the text of its JSON. Those of GET stand in the query. An item is
handed to one poller. What it doesn't hold when it asks again was lost on the way and is handed out at once; so a
poller that never holds anything sees everything that is unanswered, as with RLM's. An item goes to another
poller when its own was not heard of for "lease_seconds". "gone" are held ids that nobody waits for any more, but for
those that this poller has answered.

The first answer to an item counts, and a repeated one is accepted without effect. The same goes for a repeated
/enqueue with an "id" that the guest chose: it waits for the same answer, or gets what was answered a while ago. Whose
guest doesn't come back for "return_seconds" is dropped, and one without such an id at once.
"""

import collections
import hashlib
import json
import re
import threading
import time
import uuid

LIMITS = {
    "request_bytes_max": 16 << 20,  # Of a guest's body.
    "requests_bytes_max": 128 << 20,  # Of all bodies of guests that arrive or wait.
    "answer_bytes_max": 64 << 20,  # Of a host's body.
    "kept_bytes_max": 64 << 20,  # Of answers that are kept for those who repeat their question.
    "kept_max": 1024,
    "items_max": 256,  # Unanswered, and waiting connections of guests.
    "connections_max": 320,
    "answer_seconds_max": 300,  # From /enqueue to its answer.
    "lease_seconds": 30,
    "return_seconds": 30,
    "idle_seconds": 75,  # A connection without a request.
    "head_seconds": 10,  # From the first byte of a connection, or of a line, to the end of the headers.
    "body_seconds": 60,
    "send_seconds": 60,
}
SETTINGS_MAX = LINE_MAX = 1 << 16
TOKEN_MIN, WAIT_MAX = 16, 60.0
POLLERS_MAX, ANSWERED_MAX = 16, 4096
ANY = "-"  # A poller that doesn't give its name.
POLL_BYTES = 8 << 20  # Of the items of one poll, if they are more than one.
GATHER = 0.002  # Seconds that a poll waits for more when it has the first: what threads ask at once needs one round trip.
LOOK = 0.5  # Seconds between two looks at whether a waiting peer is still there.
DRAIN_PIECES, DRAIN_SECONDS = 256, 2.0  # What is read of a refused request, so that its sender reads the answer.
STACK, PR_SET_DUMPABLE = 512 << 10, 4  # The latter of linux/prctl.h.
IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status, code, text, **headers):
        super().__init__(text)
        self.status, self.code, self.text, self.headers = status, code, text, headers


def unreadable(text):
    return Refused(400, "bad_request", text)


def crowded(text):
    return Refused(503, "busy", text + "; try again", Retry_After="1")


def constant(name):
    raise ValueError(f"{name} is no JSON")


def read_object(body):
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise unreadable(f"the body is no JSON: {error or type(error).__name__}") from None
    if not isinstance(found, dict):
        raise unreadable("the body must be a JSON object")
    return found


def identifier(value):
    if not isinstance(value, str) or not IDENTIFIER.match(value):
        raise unreadable("an id is a string of 1 to 64 letters, digits and any of _.:-")
    return value


def number(value, name, most):
    """A number from 0 to `most`; what is more is `most`."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = -1.0
    if isinstance(value, bool) or not found >= 0.0:
        raise unreadable(f"'{name}' must be a number that is not negative")
    return min(found, most)


class Item:
    """A request of a guest until it's answered."""

    def __init__(self, name, is_chosen, body, until, lock):
        self.name, self.is_chosen, self.body, self.until = name, is_chosen, body, until
        self.waiting, self.left = 0, None  # How many wait, and when the last of them went away.
        self.poller, self.lease, self.answer = None, 0.0, None
        self.changed = threading.Condition(lock)


class Queue:
    """What guests asked and hosts haven't answered. Under its one lock nothing is done but bookkeeping."""

    def __init__(self, limits):
        self.limits, self.lock = limits, threading.Lock()
        self.arrived = threading.Condition(self.lock)
        self.items = collections.OrderedDict()
        self.kept = collections.OrderedDict()  # By id: digest of the request, answer, time.
        self.answered = collections.OrderedDict()  # By id: whose answer it was.
        self.pollers = collections.OrderedDict()  # The number of the last poll, by poller.
        self.bytes = self.kept_bytes = self.waiting = 0

    def reserve(self, size):
        """Takes room for so many bytes, or gives them back if negative."""
        with self.lock:
            if size > 0 and self.bytes + size > self.limits["requests_bytes_max"]:
                raise crowded("the broker holds as many bytes of requests as it may")
            self.bytes += size

    def ask(self, body, is_there):
        """The answer to a request, whose bytes were reserved; they are given back by whoever drops it."""
        try:
            request = read_object(body)
            if not isinstance(request.get("type"), str):
                raise unreadable("'type' must say what is asked, such as \"single\"")
            most = self.limits["answer_seconds_max"]
            timeout = number(request["timeout"], "timeout", most) if "timeout" in request else most
            is_chosen = request.get("id") is not None
            name = identifier(request["id"]) if is_chosen else str(uuid.uuid4())
        except BaseException:
            self.reserve(-len(body))
            raise
        del request
        with self.lock:
            item, answer = self.find(name, is_chosen, body, time.monotonic() + timeout)
            if answer is not None:
                return answer
            item.waiting += 1
            self.waiting += 1
            try:
                return self.wait(item, is_there)
            finally:
                item.waiting -= 1
                self.waiting -= 1
                item.left = time.monotonic()
                # Who chose an id may come back for the answer.
                if item.answer is None and (item.left >= item.until or not (item.waiting or is_chosen)):
                    self.drop(item)

    def find(self, name, is_chosen, body, until):
        """The item of a request, or its answer if it was asked before."""
        self.expire()
        known = self.items.get(name)
        try:
            if name in self.kept:
                digest, answer, _ = self.kept[name]
                is_other = digest != hashlib.sha256(body).digest()
            else:
                answer, is_other = None, known is not None and known.body != body
            if is_other:
                raise Refused(409, "conflict", "another request has this id")
            if answer is not None:
                return None, answer
            if max(self.waiting, len(self.items) if known is None else 0) >= self.limits["items_max"]:
                raise crowded("as many requests wait as may")
            if known is None:
                known = self.items[name] = Item(name, is_chosen, body, until, self.lock)
                self.arrived.notify_all()
            return known, None
        finally:
            # What is in the queue counts once.
            if known is None or known.body is not body:
                self.bytes -= len(body)

    def wait(self, item, is_there):
        while item.answer is None:
            left = item.until - time.monotonic()
            if left <= 0.0 or self.items.get(item.name) is not item:
                raise Refused(504, "timeout", "Request timed out")
            item.changed.wait(min(left, LOOK))
            if item.answer is None and not is_there():
                raise ConnectionError
        return item.answer

    def drop(self, item):
        if self.items.get(item.name) is item:
            del self.items[item.name]
            self.bytes -= len(item.body)
            self.arrived.notify_all()
            item.changed.notify_all()

    def expire(self):
        """Drops what is too late. Those who wait see to it themselves, but some have gone."""
        now = time.monotonic()
        for item in [item for item in self.items.values() if now >= item.until or self.is_left(item, now)]:
            self.drop(item)

    def is_left(self, item, now):
        return not item.waiting and item.left is not None and now - item.left > self.limits["return_seconds"]

    def poll(self, poller, held, most, wait, is_there):
        """Items for a poller, and which of those that it holds are gone."""
        until = time.monotonic() + wait
        with self.lock:
            turn = self.pollers.pop(poller, 0) + 1
            self.pollers[poller] = turn
            while len(self.pollers) > POLLERS_MAX:
                self.pollers.popitem(last=False)
            self.arrived.notify_all()
            is_gathering = False
            while True:
                now = time.monotonic()
                # A newer poll of the same host took the place of this one, whose answer nobody reads.
                if self.pollers.get(poller) != turn or not is_there():
                    return [], []
                found = self.due(poller, held, most, now)
                if found and not is_gathering:
                    is_gathering, until = True, min(until, now + GATHER)
                # Its own answer is no news to a host, and must not end the poll that the next item needs.
                gone = [name for name in held if name not in self.items and self.answered.get(name) != poller]
                if gone or now >= until:
                    self.lend(poller, held, found, now)
                    return [(item.name, item.body, item.until - now) for item in found], gone
                self.lend(poller, held, (), now)
                self.arrived.wait(min(until - now, LOOK))

    def due(self, poller, held, most, now):
        self.expire()
        found, size = [], 0
        for item in self.items.values():
            if item.name in held or not (item.poller in (None, poller) or now >= item.lease):
                continue
            size += len(item.body)
            if len(found) == most or (found and size > POLL_BYTES):
                break
            found.append(item)
        return found

    def lend(self, poller, held, found, now):
        held = filter(None, map(self.items.get, held))
        for item in [*found, *(item for item in held if item.poller in (None, poller) or now >= item.lease)]:
            item.poller, item.lease = poller, now + self.limits["lease_seconds"]

    def respond(self, name, answer, poller):
        with self.lock:
            item = self.items.get(name)
            if item is None:
                if name in self.answered:
                    return
                raise Refused(404, "unknown_id", "Request not found")
            item.answer = answer
            self.answered[name] = poller
            while len(self.answered) > ANSWERED_MAX:
                self.answered.popitem(last=False)
            if item.is_chosen:
                self.keep(item)
            self.drop(item)

    def keep(self, item):
        now = time.monotonic()
        self.kept[item.name] = (hashlib.sha256(item.body).digest(), item.answer, now)
        self.kept_bytes += len(item.answer)
        while self.kept:
            name, (_, answer, at) = next(iter(self.kept.items()))
            is_old = now - at > self.limits["answer_seconds_max"]
            is_full = self.kept_bytes > self.limits["kept_bytes_max"] or len(self.kept) > self.limits["kept_max"]
            if not is_old and not is_full:
                break
            del self.kept[name]
            self.kept_bytes -= len(answer)
