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
import hmac
import http.server
import io
import itertools
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
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
            while True:
                now = time.monotonic()
                # A newer poll of the same host took the place of this one, whose answer nobody reads.
                if self.pollers.get(poller) != turn or not is_there():
                    return [], []
                found = self.due(poller, held, most, now)
                # Its own answer is no news to a host, and must not end the poll that the next item needs.
                gone = [name for name in held if name not in self.items and self.answered.get(name) != poller]
                if found or gone or now >= until:
                    self.lend(poller, held, found, now)
                    return [(item.name, item.body, item.until - now) for item in found], gone
                self.lend(poller, held, (), now)
                self.arrived.wait(min(until - now, LOOK))

    def due(self, poller, held, most, now):
        self.expire()
        free = (item for item in self.items.values() if item.poller in (None, poller) or now >= item.lease)
        return list(itertools.islice((item for item in free if item.name not in held), most))

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


class Incoming(io.RawIOBase):
    """A connection's bytes, until a time: how often a peer sends a byte doesn't matter."""

    def __init__(self, connection):
        self.connection = connection
        self.until = 0.0

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.until - time.monotonic()
        if left <= 0.0:
            raise socket.timeout
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = default_request_version = "HTTP/1.1"

    def setup(self):
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self.incoming, 1 << 16)
        self.wfile = io.BytesIO()
        self.limits = self.server.limits
        self.is_known = self.unread = False

    def finish(self):
        if self.unread:
            # Closing now would reset the connection, and cost the peer the answer.
            self.connection.shutdown(socket.SHUT_WR)
            self.incoming.until = time.monotonic() + DRAIN_SECONDS
            for _ in range(DRAIN_PIECES):
                if not self.incoming.readinto(bytearray(1 << 16)):
                    break

    def handle_one_request(self):
        self.server.rests(self)
        seconds = self.limits["idle_seconds" if self.is_known else "head_seconds"]
        self.incoming.until = time.monotonic() + seconds
        self.raw_requestline = self.rfile.readline(LINE_MAX)
        if not self.raw_requestline.endswith(b"\n"):
            self.close_connection = True
            return
        self.incoming.until = time.monotonic() + self.limits["head_seconds"]
        # It answers by itself if it can't be read.
        if not self.parse_request():
            return
        self.unread = "content-length" in self.headers or "transfer-encoding" in self.headers
        try:
            self.send(200, self.answer())
        except Refused as refused:
            if self.unread:
                self.close_connection = True
            self.send(refused.status, error_json(refused.code, refused.text), refused.headers)

    def answer(self):
        path, _, query = self.path.partition("?")
        if path == "/health":
            self.method("GET")
            return b'{"status": "ok"}'
        role = self.role()
        # From here on the connection isn't taken for one of a stranger, nor closed to make room.
        self.is_known = True
        self.server.works(self)
        if path not in ("/enqueue", "/pending", "/respond"):
            raise Refused(404, "unknown_path", "there are /health, /enqueue, /pending and /respond")
        if role != ("guest" if path == "/enqueue" else "host"):
            raise Refused(403, "forbidden", f"{path} is not for the token of the {role}")
        return getattr(self, path[1:])(query)

    def role(self):
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        # Both are always compared, and digests: how long it takes tells nothing of the tokens.
        found = [role for role, known in self.server.tokens.items() if hmac.compare_digest(digest, known)]
        if scheme.lower() != "bearer" or not found:
            text = "the header `Authorization: Bearer TOKEN` is missing or wrong"
            raise Refused(401, "unauthorized", text, WWW_Authenticate="Bearer")
        return found[0]

    def method(self, *allowed):
        if self.command not in allowed:
            text = f"{self.command[:16]} is not allowed here"
            raise Refused(405, "method", text, Allow=", ".join(allowed))

    def length(self, most):
        lengths = self.headers.get_all("content-length", [])
        if "transfer-encoding" in self.headers or len(lengths) != 1 or not re.match(r"[0-9]{1,18}\Z", lengths[0]):
            raise Refused(411, "length_required", "a body needs one Content-Length, and no Transfer-Encoding")
        if int(lengths[0]) > most:
            raise Refused(413, "too_large", f"the body has {lengths[0]} bytes; {most} are allowed")
        return int(lengths[0])

    def body(self, size):
        self.incoming.until = time.monotonic() + self.limits["body_seconds"]
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError
        self.unread = False
        return body

    def is_there(self):
        """Whether the peer of a request that waits still does."""
        try:
            self.connection.settimeout(0.0)
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def enqueue(self, _):
        self.method("POST")
        size = self.length(self.limits["request_bytes_max"])
        self.server.queue.reserve(size)
        try:
            body = self.body(size)
        except BaseException:
            self.server.queue.reserve(-size)
            raise
        return self.server.queue.ask(body, self.is_there)

    def pending(self, query):
        self.method("GET", "POST")
        if self.command == "POST":
            asked = read_object(self.body(self.length(self.limits["request_bytes_max"])))
            held = asked.get("held", [])
        else:
            try:
                asked = {name: values[-1] for name, values in urllib.parse.parse_qs(query, max_num_fields=16).items()}
            except ValueError:
                raise unreadable("the query has too many fields") from None
            held = [name for name in asked.get("held", "").split(",") if name]
        if not isinstance(held, list) or len(held) > ANSWERED_MAX:
            raise unreadable(f"'held' must be a list of at most {ANSWERED_MAX} ids")
        held = dict.fromkeys(map(identifier, held))
        poller = identifier(asked.get("poller", ANY))
        most = int(number(asked.get("max", 64), "max", 1024))
        wait = number(asked.get("wait", 0), "wait", WAIT_MAX)
        found, gone = self.server.queue.poll(poller, held, most, wait, self.is_there)
        as_text = asked.get("form") == "text"
        parts = []
        for name, body, left in found:
            request = json.dumps(body.decode("utf-8")).encode() if as_text else body
            parts.append(b'{"id": "%s", "timeout": %.3f, "request": %s}' % (name.encode(), left, request))
        return b'{"pending": [%s], "gone": %s}' % (b", ".join(parts), json.dumps(gone).encode())

    def respond(self, _):
        self.method("POST")
        asked = read_object(self.body(self.length(self.limits["answer_bytes_max"])))
        if not isinstance(asked.get("response"), dict):
            raise unreadable("'response' must be the object that the guest gets")
        name, poller = identifier(asked.get("id")), identifier(asked.get("poller", ANY))
        self.server.queue.respond(name, json.dumps(asked["response"]).encode(), poller)
        return b'{"status": "ok"}'

    def send(self, status, body, headers=None):
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        head = self.wfile.getvalue()
        self.wfile = io.BytesIO()
        self.connection.settimeout(self.limits["send_seconds"])
        self.connection.sendall(head if self.command == "HEAD" else head + body)

    def send_error(self, code, message=None, explain=None):
        """Of a head that can't be read."""
        self.close_connection = self.unread = True
        self.send(int(code), error_json("bad_request", message or "the request can't be read"))

    def handle_expect_100(self):
        self.connection.settimeout(self.limits["send_seconds"])
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True


def error_json(code, text):
    return json.dumps({"error": text, "code": code}).encode()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address, tokens, limits):
        self.limits = limits
        self.tokens = {role: hashlib.sha256(token.encode()).digest() for role, token in tokens.items()}
        self.queue = Queue(limits)
        self.lock, self.open = threading.Lock(), set()
        self.resting = collections.OrderedDict()  # Handlers that wait for a request or its token.
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def rests(self, handler):
        with self.lock:
            self.resting[handler] = None

    def works(self, handler):
        with self.lock:
            self.resting.pop(handler, None)

    def process_request(self, request, address):
        with self.lock:
            self.open.add(request)
            # Those who hold connections without asking anything can't keep others out.
            while len(self.open) > self.limits["connections_max"] and self.resting:
                self.make_room()
            is_full = len(self.open) > self.limits["connections_max"]
        try:
            if is_full:
                raise ConnectionError
            super().process_request(request, address)
        except BaseException:
            # There may be no more threads, too. The connection is closed by the caller.
            self.ended(request)
            raise

    def make_room(self):
        """Ends the connection that has rested longest, strangers before others. Its thread then ends soon."""
        strangers = (handler for handler in self.resting if not handler.is_known)
        oldest = next(strangers, None) or next(iter(self.resting))
        del self.resting[oldest]
        self.open.discard(oldest.request)
        try:
            oldest.request.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.ended(request)

    def ended(self, request):
        with self.lock:
            self.open.discard(request)

    def finish_request(self, request, address):
        handler = Handler.__new__(Handler)
        try:
            handler.__init__(request, address, self)
        finally:
            self.works(handler)

    def handle_error(self, request, address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"broker: {type(error).__name__}: {error}", file=sys.stderr)


def read_settings(line):
    settings = json.loads(line) if len(line) <= SETTINGS_MAX else None
    if not isinstance(settings, dict):
        raise ValueError(f"the settings must be a JSON object in one line of at most {SETTINGS_MAX} bytes")
    tokens = {role: settings.pop(role + "_token", None) for role in ("host", "guest")}
    for role, token in tokens.items():
        if not isinstance(token, str) or len(token) < TOKEN_MIN:
            raise ValueError(f"{role}_token must be a text of {TOKEN_MIN} bytes or more")
    if tokens["host"] == tokens["guest"]:
        raise ValueError("host_token and guest_token must differ")
    bind, port = settings.pop("bind", "0.0.0.0"), settings.pop("port", 8080)
    if not isinstance(bind, str) or type(port) is not int or not 0 <= port < 1 << 16:
        raise ValueError("bind must be an address and port a number from 0 to 65535")
    limits = dict(LIMITS)
    for name, value in settings.items():
        if name not in limits:
            raise ValueError(f"{name} is no setting")
        if type(value) not in (int, float) or not 0 < value < 1 << 40:
            raise ValueError(f"{name} must be a number above 0")
        limits[name] = value
    return (bind, port), tokens, limits


def main():
    try:
        # Cells of the same user must not find the host's token in this process. Best effort: other systems, and
        # Pythons without ctypes, don't have it.
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    except Exception:
        pass
    threading.stack_size(STACK)
    try:
        address, tokens, limits = read_settings(sys.stdin.buffer.readline(SETTINGS_MAX + 1))
        server = Server(address, tokens, limits)
    except (ValueError, RecursionError, OSError, OverflowError) as error:
        print(json.dumps({"error": f"broker: {error}"}), flush=True)
        sys.exit(1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"event": "listening", "port": server.server_address[1]}), flush=True)
    while os.read(0, 1 << 16):
        pass
    os._exit(0)


main()
