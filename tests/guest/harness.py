"""A host for tests of the guest agent: starts the agent in a process of its own and speaks the channel over pipes."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time

GUEST = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "guest"))
PROMPTS = {b"L": "llm", b"R": "rlm"}  # Tags of frames that are one prompt.
ORDER = "values streams imports calls cells namespace profiles repairs freeze pools locks threads loop agent __init__".split()

CHILD = """
def child():
    import os, sys, types  # Here, because the agent clears `__main__`.
    down, up, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    def read(size):
        data = b""
        while len(data) < size:
            piece = os.read(down, size - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return data
    def call(frame):
        data = len(frame).to_bytes(4, "big") + frame
        while data:
            data = data[os.write(up, data):]
        return read(int.from_bytes(read(4), "big"))
    sys.dont_write_bytecode = True
    sys.path.insert(0, sys.argv[4])
    sys.argv[1:] = []
    if mode == "bootstrap":
        sys.modules["_host"] = types.ModuleType("_host")
        sys.modules["_host"].call = call
        with open(os.path.join(sys.path.pop(0), "kaa_agent", "bootstrap.py")) as file:
            source = file.read()
        exec(compile(source, "<kaa>/bootstrap.py", "exec"), sys.modules["__main__"].__dict__)
        turn = lambda: eval("__kaa_turn__()", sys.modules["__main__"].__dict__)
    else:
        import kaa_agent.agent as agent
        agent.install(call, shims=mode == "shims")
        turn = agent.turn
    while True:
        turn()
child()
"""


class Guest:
    """One guest process and the host's side of its channel."""

    def __init__(self, mode="plain"):
        self.folder = tempfile.TemporaryDirectory()
        os.symlink(GUEST, os.path.join(self.folder.name, "kaa_agent"))
        down_read, self.down = os.pipe()
        self.up, up_write = os.pipe()
        self.files = [open(os.path.join(self.folder.name, name), "w+b") for name in ("stdout", "stderr")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(down_read), str(up_write), mode, self.folder.name],
            pass_fds=(down_read, up_write),
            stdout=self.files[0],
            stderr=self.files[1],
            stdin=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self.read_to = [0, 0]
        self.calls = []  # Headers of the calls of the last request.
        self.why = {"limit": None}
        self.tools = {}
        self.lm = lambda header, prompts: {"responses": ["<%s>" % prompt for prompt in prompts]}
        self.cells = 0
        header = self.receive()[0]
        if header == {"op": "sources"}:
            self.send_sources()
            header = self.receive()[0]
        assert header == {"op": "next"}, header

    def close(self):
        os.close(self.down)
        self.process.kill()
        self.process.wait(10)
        os.close(self.up)
        for file in self.files:
            file.close()
        self.folder.cleanup()

    # --- the channel ---

    def receive(self):
        frame = self.read(int.from_bytes(self.read(4), "big"))
        if frame[:1] in PROMPTS:
            return {"op": "lm", "kind": PROMPTS[frame[:1]], "tagged": True}, frame[1:]
        end = 4 + int.from_bytes(frame[:4], "big")
        header = json.loads(frame[4:end].decode("utf-8"))
        return header, frame[end:]

    def read(self, size):
        data = bytearray()
        while len(data) < size:
            if not select.select([self.up], [], [], 8)[0]:
                raise EOFError("the guest hangs")
            piece = os.read(self.up, min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError("the guest died: " + self.output()[1])
            data += piece
        return bytes(data)

    def send(self, header, body=b""):
        text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
        self.send_frame(len(text).to_bytes(4, "big") + text + body)

    def send_frame(self, frame):
        data = len(frame).to_bytes(4, "big") + frame
        while data:
            data = data[os.write(self.down, data) :]

    def send_sources(self):
        rows, body = [], b""
        for name in ORDER:
            with open(os.path.join(GUEST, name + ".py"), "rb") as file:
                source = file.read()
            rows.append([name, len(body), len(source)])
            body += source
        self.send({"sources": rows}, body)

    def request(self, header, body=b""):
        """One request and its reply; calls of the guest are answered meanwhile."""
        self.calls = []
        self.send(header, body)
        while True:
            reply, data = self.receive()
            if reply["op"] == "done":
                self.body = data
                return reply
            self.calls.append(reply)
            self.answer(reply, data)

    def answer(self, call, data):
        if call["op"] == "why":
            self.send(self.why)
        elif call["op"] == "lm":
            # Without prompts the body is the only one; a single answer may be a text alone, too.
            if "prompts" not in call:
                call["prompts"] = [data.decode()]
            encoded = call["prompts"]
            answer = self.lm(call, [self.decode(prompt, data) for prompt in encoded])
            texts = answer.get("responses") or [None]
            if len(texts) == len(encoded) == 1 and texts[0]:
                self.send_frame(b"T" + texts[0].encode("utf-8", "replace"))
            else:
                self.send(answer)
        elif call["op"] == "tool":
            args = [self.decode(arg, data) for arg in call["args"]]
            try:
                value = self.tools[call["name"]](*args, **call["kwargs"])
                if isinstance(value, str):
                    self.send_frame(b"T" + value.encode("utf-8", "replace"))
                else:
                    self.send({"value": value})
            except Exception as error:
                self.send({"error": str(error), "type": type(error).__name__})

    @staticmethod
    def decode(value, body):
        if isinstance(value, dict) and len(value) == 1:
            ((kind, span),) = value.items()
            if kind in ("$str", "$wtf8"):
                return body[span[0] : span[0] + span[1]].decode("utf-8", "surrogatepass")
        return value

    # --- conveniences ---

    def output(self):
        """What was written to stdout and stderr since the last look."""
        texts = []
        for index, file in enumerate(self.files):
            file.seek(self.read_to[index])
            data = file.read()
            self.read_to[index] += len(data)
            texts.append(data.decode("utf-8"))
        return texts

    def cell(self, code):
        """Runs a cell; the reply with `stdout` and `stderr` added."""
        self.output()
        self.cells += 1
        body = code if isinstance(code, bytes) else code.encode("utf-8", "surrogatepass")
        nothing = {"exit_code": None, "value": None, "exception": None, "variables": [], "final_answer": None}
        reply = {**nothing, **self.request({"op": "exec", "cell": self.cells}, body)}
        reply["stdout"], reply["stderr"] = self.output()
        return reply

    def forget_stop(self):
        """As the host does when a turn begins: a signal that comes late has no reason."""
        self.why = {"limit": None}

    def stop_after(self, seconds, why, times=1):
        """A soft stop: the signal, and the reason that the guest will be given."""
        self.why = why

        def run():
            for _ in range(times):
                time.sleep(seconds)
                os.kill(self.process.pid, signal.SIGINT)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread
