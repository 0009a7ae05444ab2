"""What people do with Modal's Python client, one case per call: `client.py CASE [JSON]`.

Cases assert what they see. Their last line of output is a JSON object for the test that called them.
"""

import hashlib
import io
import json
import ssl
import sys
import time
import urllib.request

import modal
from modal.exception import AuthError, ImageBuildError, InvalidError, NotFoundError

BASE = modal.Image.from_registry("python:3.11-slim")


def make(*arguments, image=BASE, **options):
    app = modal.App.lookup("official", create_if_missing=True)
    options.setdefault("timeout", 120)
    return modal.Sandbox.create(*(arguments or ("sleep", "infinity")), app=app, image=image, **options)


def run(sandbox, *arguments, **options):
    process = sandbox.exec(*arguments, **options)
    return process.stdout.read(), process.stderr.read(), process.wait()


def whole(plan):
    """One sandbox with everything set, used in every way."""
    image = BASE.pip_install("dill").env({"FROM_IMAGE": "a b"})
    sandbox = make(
        image=image,
        cpu=(0.5, 2.0),
        memory=(128, 4096),
        secrets=[modal.Secret.from_name("known"), modal.Secret.from_dict({"INLINE": "i"})],
        env={"FROM_ENV": "e"},
        workdir="/work",
        tags={"kind": "test", "n": "1"},
        encrypted_ports=[plan["port"]],
        unencrypted_ports=[plan["other_port"]],
    )
    code = "import os, dill; print([os.environ.get(n) for n in ('FROM_IMAGE', 'KNOWN', 'INLINE', 'FROM_ENV', 'OWN')]); print(os.getcwd())"
    out, err, status = run(sandbox, "python3", "-c", code, env={"OWN": "o"})
    values, folder = out.splitlines()
    assert (values, err, status) == ("['a b', 'k', 'i', 'e', 'o']", "", 0), (out, err, status)
    assert folder.endswith("/work"), folder

    # Lines go in and come back while the process runs.
    process = sandbox.exec("python3", "-u", "-c", "import sys\nfor line in sys.stdin: print(line.upper(), end=''); print(len(line), file=sys.stderr)")
    lines = iter(process.stdout)
    for line in ("one\n", "zw\u00f6lf\n"):
        process.stdin.write(line)
        process.stdin.drain()
        assert next(lines) == line.upper()
    assert process.poll() is None
    process.stdin.write_eof()
    process.stdin.drain()
    assert (process.wait(), process.stderr.read()) == (0, "4\n6\n")
    assert process.poll() == 0

    assert run(sandbox, "sh", "-c", "exit 7")[2] == 7
    assert run(sandbox, "sh", "-c", "kill -TERM $$")[2] == 128 + 15
    started = time.monotonic()
    assert run(sandbox, "sleep", "60", timeout=1)[2] in (-1, 137)
    assert time.monotonic() - started < 30
    size = 3 << 20
    out, _, status = run(sandbox, "python3", "-c", f"print('x' * {size}, end='')")
    assert (len(out), status) == (size, 0)

    sandbox.exec("sh", "-c", "echo kept > file").wait()
    copy = make("sleep", "infinity", image=sandbox.snapshot_filesystem(), workdir="/work")
    assert run(copy, "cat", "file")[0] == "kept\n"
    copy.terminate()

    server = sandbox.exec("python3", "-m", "http.server", str(plan["port"]), "--bind", "127.0.0.1")
    tunnels = sandbox.tunnels()
    assert set(tunnels) == {plan["port"], plan["other_port"]}, tunnels
    trust = ssl.create_default_context(cafile=plan["certificate"])
    for _ in range(200):
        try:
            answer = urllib.request.urlopen(tunnels[plan["port"]].url + "/file", context=trust, timeout=10)
            break
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    assert answer.read() == b"kept\n"
    assert server.poll() is None

    app = modal.App.lookup("official")
    found = [other.object_id for other in modal.Sandbox.list(app_id=app.app_id, tags={"kind": "test"})]
    assert found == [sandbox.object_id], found
    again = modal.Sandbox.from_id(sandbox.object_id)
    assert run(again, "echo", "hi")[0] == "hi\n"
    assert sandbox.poll() is None
    sandbox.terminate()
    sandbox.wait(raise_on_termination=False)
    assert sandbox.poll() == 137 and sandbox.returncode == 137
    return {"id": sandbox.object_id}


def streams(plan):
    """Stdin as one stream of messages, with what the options of the server make of it."""
    sandbox = make()
    data = bytes(range(256)) * 8192
    process = sandbox.exec("python3", "-c", "import sys, hashlib; d = sys.stdin.buffer.read(); print(len(d), hashlib.sha256(d).hexdigest())")
    process._stdin_write_stream(io.BytesIO(data))
    assert process.stdout.read() == f"{len(data)} {hashlib.sha256(data).hexdigest()}\n"
    assert process.wait() == 0
    sandbox.terminate()
    return {}


def talk(plan):
    """A conversation over stdin and stdout, which has to be the same whatever goes wrong on the way."""
    sandbox = make(image=BASE.pip_install("dill"))
    process = sandbox.exec("python3", "-u", "-c", "import sys\nfor line in sys.stdin: print('>' + line, end='')")
    lines = iter(process.stdout)
    for number in range(5):
        process.stdin.write(f"{number}\n")
        process.stdin.drain()
        assert next(lines) == f">{number}\n"
    process.stdin.write_eof()
    process.stdin.drain()
    assert list(lines) == []
    assert process.wait() == 0
    sandbox.terminate()
    return {}


def requests(plan):
    """What the test compares with Kaa's own requests, message by message."""
    image = BASE.pip_install("dill")
    sandbox = make(
        image=image,
        cpu=(1.0, 1.0),
        memory=(1024, 1024),
        timeout=600,
        tags={"kind": "requests"},
        env={"GIVEN": "g"},
        block_network=True,
        workdir="/work",
    )
    for is_stream in (False, True):
        process = sandbox.exec("sh", "-c", "cat; exit 7", env={"OWN": "o"})
        if is_stream:
            process._stdin_write_stream(io.BytesIO(b"hello"))
        else:
            process.stdin.write("hello")
            process.stdin.drain()
            process.stdin.write_eof()
            process.stdin.drain()
        assert (process.stdout.read(), process.stderr.read()) == ("hello", "")
        assert process.wait() == 7
    sandbox.snapshot_filesystem(ttl=None)
    assert run(modal.Sandbox.from_id(sandbox.object_id), "true")[2] == 0
    found = list(modal.Sandbox.list(app_id=modal.App.lookup("official").app_id))
    assert [other.object_id for other in found] == [sandbox.object_id]
    sandbox.terminate()
    sandbox.wait(raise_on_termination=False)
    return {}


def ends(plan):
    """How sandboxes end by themselves."""
    ended = make("sh", "-c", "exit 3")
    ended.wait()
    assert ended.returncode == 3
    late = make(timeout=1)
    try:
        late.wait()
        raise AssertionError("no timeout")
    except modal.exception.SandboxTimeoutError:
        assert late.returncode == 124
    try:
        run(late, "true")
        raise AssertionError("a process in a sandbox that has ended")
    except (NotFoundError, modal.exception.ConflictError, modal.exception.SandboxTerminatedError):
        pass
    return {}


def refused(plan):
    """What Modal doesn't do, and how its client tells people."""
    for attempt, error in [
        (lambda: make(secrets=[modal.Secret.from_name("missing")]), NotFoundError),
        (lambda: make(image=modal.Image.from_registry("nowhere.example/none:1")), ImageBuildError),
        (lambda: make(image=BASE.run_commands("echo before", "exit 5")), ImageBuildError),
        (lambda: make(block_network=True, encrypted_ports=[8000]), InvalidError),
        (lambda: make(workdir="relative"), InvalidError),
        (lambda: modal.Sandbox.from_id("sb-1234567890123456789012345678901234567890"), NotFoundError),
        (lambda: modal.App.lookup("no-such-app"), NotFoundError),
    ]:
        try:
            attempt()
        except error:
            continue
        raise AssertionError(f"no {error}")
    sandbox = make(block_network=True)
    process = sandbox.exec("python3", "-c", "x", "y" * 60_000)
    assert process.wait() == 1
    try:
        sandbox.exec("echo", "y" * 70_000)
        raise AssertionError("arguments without end")
    except InvalidError:
        pass
    sandbox.terminate()
    return {}


def stranger(plan):
    """Somebody whose token isn't taken."""
    try:
        modal.App.lookup("official", create_if_missing=True)
    except AuthError:
        return {}
    raise AssertionError("a wrong token was taken")


if __name__ == "__main__":
    cases = {case.__name__: case for case in (whole, streams, talk, requests, ends, refused, stranger)}
    print(json.dumps(cases[sys.argv[1]](json.loads((sys.argv[2:] or ["{}"])[0]))))
