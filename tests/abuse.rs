//! Hostile cells: after each the host is alive, a neighbour is unharmed, and the session still has
//! what it had.
//!
//! The cases are what is known to kill or hang peers, and every way out that a guest could try.

mod common;

use std::time::Duration;

use common::{limited, print, run};
use kaa::{EnvironmentExt, Error, Limit, Limits, Outcome};

/// What a case must come to.
enum Expect {
    /// An exception of this type, and nothing lost.
    Raises(&'static str),
    /// The interpreter ended with this code; rolled back.
    Exits(i32),
    /// Softly stopped by this limit.
    Soft(Limit),
    /// Rolled back after this limit.
    Hard(Limit),
    /// It ends by itself, one way or another.
    Ends,
}
use Expect::{Ends, Exits, Hard, Raises, Soft};

const CASES: &[(&str, &str, Expect)] = &[
    // The lines that abort a peer's host process.
    ("json depth", "import json; json.loads('['*200000)", Raises("RecursionError")),
    ("parentheses", "eval('('*5000 + ')'*5000)", Raises("MemoryError")),
    (
        "deep repr",
        "deep = []\nfor i in range(200000): deep = [deep]\nrepr(deep)",
        Raises("RecursionError"),
    ),
    ("recursion", "def f(): f()\nf()", Raises("RecursionError")),
    (
        "recursion without limit",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return f(n + 1)\nf(0)",
        Raises("RecursionError"),
    ),
    ("dropping a deep list", "deep = None", Exits(134)),
    ("_exit", "import os; os._exit(3)", Exits(3)),
    ("abort", "import os; os.abort()", Exits(134)),
    ("kill", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Ends),
    ("raise_signal", "import signal; signal.raise_signal(signal.SIGABRT)", Exits(134)),
    ("big power", "3**10**8", Soft(Limit::Compute)),
    ("big shift", "1 << 10**11", Ends),
    ("regex bomb", "import re; re.match('(a+)+$', 'a'*40 + 'b')", Soft(Limit::Compute)),
    ("bytearray", "b = bytearray(2**30 + 2**29)", Raises("MemoryError")),
    ("list bomb", "x = [0]\nwhile True: x = x + x", Raises("MemoryError")),
    ("string bomb", "s = 'x'\nwhile True: s += s", Raises("MemoryError")),
    ("dict bomb", "d = {}\ni = 0\nwhile True:\n    d[i] = 'x' * 1000\n    i += 1", Ends),
    ("endless loop", "while True: pass", Soft(Limit::Compute)),
    ("endless generator", "sum(x for x in iter(int, 1))", Soft(Limit::Compute)),
    ("sorted with key", "sorted(range(10**7), key=lambda x: -x)", Ends),
    (
        "stubborn loop",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        Hard(Limit::Compute),
    ),
    (
        "stubborn finally",
        "def f():\n    try:\n        while True: pass\n    finally: f()\nf()",
        Ends,
    ),
    ("sleep", "import time; time.sleep(100)", Soft(Limit::Wall)),
    (
        "stubborn sleep",
        "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        Hard(Limit::Wall),
    ),
    ("select", "import select; select.select([], [], [], 100)", Ends),
    ("fork", "import os; os.fork()", Raises("AttributeError")),
    ("system", "import os; os.system('true')", Raises("AttributeError")),
    ("subprocess", "import subprocess; subprocess.run(['true'])", Raises("OSError")),
    ("socket", "import socket; socket.create_connection(('127.0.0.1', 80))", Ends),
    (
        "multiprocessing",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        Ends,
    ),
    ("ssl", "import ssl", Raises("ModuleNotFoundError")),
    ("ctypes", "import ctypes; ctypes.string_at(0)", Ends),
    ("raw pointer", "import _ctypes", Raises("ModuleNotFoundError")),
    (
        "bad code object",
        "def f(): pass\nf.__code__ = f.__code__.replace(co_code=b'\\xff' * 50)\nf()",
        Ends,
    ),
    (
        "closing descriptors",
        "import os\nfor fd in range(100):\n    try: os.close(fd)\n    except OSError: pass",
        Ends,
    ),
    ("replacing streams", "import sys\nsys.stdout = sys.stderr = None\ndel sys.stdin", Ends),
    (
        "replacing print",
        "import builtins\nbuiltins.print = builtins.repr = builtins.len = None",
        Ends,
    ),
    ("emptying builtins", "import builtins\nvars(builtins).clear()", Ends),
    (
        "replacing json",
        "import json\njson.dumps = json.loads = None\nimport sys\nsys.modules.clear()",
        Ends,
    ),
    (
        "tracing",
        "import sys\nsys.settrace(lambda *a: 1/0)\nsys.setprofile(lambda *a: 1/0)\nprint(1)",
        Ends,
    ),
    ("hostile repr", "class A:\n    def __repr__(self): raise SystemExit(9)\na = A()\na", Ends),
    ("endless repr", "class A:\n    def __repr__(self):\n        while True: pass\na = A()", Ends),
    (
        "hostile exception",
        "class E(Exception):\n    def __str__(self): raise E()\nraise E()",
        Raises("E"),
    ),
    (
        "hostile class",
        "class M(type):\n    @property\n    def __name__(cls): 1/0\nclass E(Exception, metaclass=M): pass\nraise E",
        Ends,
    ),
    (
        "hostile del",
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a",
        Ends,
    ),
    (
        "deleting the agent",
        "import sys\nfor name in list(sys.modules):\n    if 'kaa' in name: del sys.modules[name]",
        Ends,
    ),
    ("gutting the agent", "import kaa_agent.agent as a\nvars(a).clear()", Ends),
    ("null source", "\0", Raises("SyntaxError")),
    ("surrogates", "print('\\ud800')", Ends),
    ("deep source", "1 + 1 + 1 + 1", Ends),
    ("atexit", "import atexit; atexit.register(lambda: 1/0)", Ends),
    (
        "threads",
        "import threading\nt = threading.Thread(target=print, args=(1,)); t.start(); t.join()",
        Ends,
    ),
    ("held lock", "import threading\nl = threading.Lock(); l.acquire(); l.acquire()", Ends),
    ("raw lock", "import _thread\nl = _thread.allocate_lock(); l.acquire(); l.acquire()", Ends),
    ("gc storm", "import gc\ngc.set_threshold(1)\nx = [[] for _ in range(20000)]", Ends),
];

fn limits() -> Limits {
    Limits {
        compute: Duration::from_millis(400),
        wall: Duration::from_millis(800),
        grace: Duration::from_millis(150),
        memory_bytes: 256 << 20,
        ..Limits::default()
    }
}

#[tokio::test]
async fn hostile_cells_cost_nothing_but_themselves() {
    let mut neighbour = limited(limits());
    run(&mut neighbour, "keep = 'neighbour'").await;
    let mut session = limited(limits());
    run(&mut session, "keep = 41").await;
    let mut wrong = Vec::new();
    for (name, code, expect) in CASES {
        // Recursion to a million frames is slow, and not what the time limits are about here.
        let patient = name.contains("recursion without");
        let options = kaa::ExecuteOptions {
            limits: Some(if patient {
                Limits {
                    compute: Duration::from_secs(60),
                    wall: Duration::from_secs(60),
                    ..limits()
                }
            } else {
                limits()
            }),
        };
        let found = match kaa::Environment::execute_opts(&mut session, code, options).await {
            Ok(execution) => {
                let kind = execution.exception.as_ref().map_or("", |e| e.type_name.as_str());
                let met = match expect {
                    Raises(name) => {
                        execution.outcome == Outcome::Raised
                            && kind == *name
                            && !execution.rolled_back
                    }
                    Exits(code) => {
                        execution.outcome == Outcome::Exited { code: *code }
                            && execution.rolled_back
                    }
                    Soft(limit) => {
                        execution.limit == Some(*limit)
                            && !execution.rolled_back
                            && execution.outcome == Outcome::LimitReached
                    }
                    Hard(limit) => execution.limit == Some(*limit) && execution.rolled_back,
                    Ends => true,
                };
                (
                    met,
                    format!(
                        "{:?} {kind} {:?} rolled back: {}",
                        execution.outcome, execution.limit, execution.rolled_back
                    ),
                )
            }
            Err(error) => (matches!(error, Error::Protocol { .. }), error.to_string()),
        };
        if !found.0 {
            wrong.push(format!("{name}: {}", found.1));
        }
        for (who, environment, kept) in
            [("session", &mut session, "41\n"), ("neighbour", &mut neighbour, "neighbour\n")]
        {
            match environment.execute("print(keep)").await {
                Ok(after) if after.stdout.text() == kept => {}
                Ok(after) => wrong.push(format!(
                    "{name}: the {who} lost its state ({}): {}",
                    found.1,
                    after.stderr.text()
                )),
                Err(error) => wrong.push(format!("{name}: the {who} is unusable: {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[tokio::test]
async fn a_gigabyte_of_output_costs_the_host_the_cap() {
    let limits = Limits { output_bytes: 1 << 20, memory_bytes: 1 << 30, ..Limits::default() };
    let mut session = limited(limits);
    run(&mut session, "print(1)").await;
    let before = resident_bytes();
    let one_line = run(&mut session, "print('x' * 200_000_000)").await;
    assert_eq!(one_line.stdout.total_bytes, 200_000_001);
    let lines = "import sys\ns = 'y' * 1_000_000\nfor _ in range(1000): sys.stderr.write(s)";
    let lines = run(&mut session, lines).await;
    assert_eq!((lines.stderr.total_bytes, lines.stderr.bytes.len()), (1_000_000_000, 1 << 20));
    // The guest's own 400 MB are its own; what is asked is that the host didn't add a copy.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 900 << 20, "{} MB more", grown >> 20);
    assert_eq!(print(&mut session, "print('still here')").await, "still here\n");
}

/// Resident memory of this process, where the system tells.
fn resident_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4096
}
