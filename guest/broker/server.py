"""The second part of the broker, after `queue.py`: its HTTP server, and the program."""

import hmac
import http.server
import io
import os
import socket
import socketserver
import sys
import urllib.parse


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
