//! What a cell's actions cost the host for good: nothing. Each is repeated until a leak of a few dozen
//! bytes, or a buffer that is kept, would show.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kaa::lm::ScriptedHandler;
use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Limits, Tool, ToolError, Value,
    WasmEnvironment,
};

use super::bait::Bait;
use super::common::open;

/// More than allocators and background tasks keep, and less than any of the actions would leave in all.
const GROWTH_MAX: u64 = 20 << 20;
/// Repetitions before the first look, so that what is made once is there: at least these, and half as many as
/// after it. A session's heap spreads over its image's pages, which stay resident in its slot.
const WARM_UP: usize = 20;

/// Name, how often, and a cell. `big` and `text` are there, of 100,000 bytes and characters.
const CELLS: &[(&str, usize, &str)] = &[
    ("open and close", 100, "for n in range(50): open(f'/tmp/{n % 3}', 'w').close()"),
    (
        "open and roll back",
        90,
        "f = [open(f'/tmp/{n}', 'w') for n in range(50)]; import os; os._exit(1)",
    ),
    (
        "descriptors",
        100,
        "import os\ntry:\n    f = [os.open('/data/plain', 0) for n in range(300)]\nexcept OSError: pass\nfor n in range(400):\n    try: os.close(n)\n    except OSError: pass",
    ),
    (
        "failing opens",
        100,
        "for n in range(100):\n    try: open('/none/' + 'n' * n)\n    except OSError: pass",
    ),
    (
        "long names",
        100,
        "import os\nfor n in range(100):\n    try: os.stat('/tmp/' + text)\n    except OSError: pass",
    ),
    (
        "directories",
        90,
        "import os\nfor n in range(20): os.mkdir(f'/tmp/d{n}')\nos.listdir('/tmp')\nfor n in range(20): os.rmdir(f'/tmp/d{n}')",
    ),
    ("reads", 100, "for n in range(50): open('/data/plain').read()"),
    ("writes", 90, "open('/tmp/w', 'wb').write(big * 10)"),
    ("messages", 400, "raise ValueError(text)"),
    ("long types", 400, "raise type('T' * 100_000, (Exception,), {})(text)"),
    ("tracebacks", 100, "def f(n):\n    return f(n + 1) + 1\nf(0)"),
    (
        "chains",
        100,
        "e = None\nfor n in range(200):\n    new = ValueError(text[:1000]); new.__cause__ = e; e = new\nraise e",
    ),
    ("syntax errors", 110, "x = ("),
    ("prints", 100, "for n in range(20): print(text)"),
    ("floods", 20, "for n in range(200): print(text)"),
    ("raw writes", 100, "import os\nfor n in range(20): os.write(1, big); os.write(2, big)"),
    ("warnings", 100, "import warnings\nfor n in range(50): warnings.warn(text[:1000] + str(n))"),
    ("last values", 110, "[text] * 20"),
    ("variables", 90, "globals().update({f'v{n}': text[n:n + 2000] for n in range(300)})"),
    (
        "names",
        100,
        "globals()['n' * 50_000 + str(id(object()))] = 1\nfor k in [k for k in globals() if k[:2] == 'nn']: del globals()[k]",
    ),
    ("answers", 110, "answer['content'] = text * 5; answer['ready'] = True"),
    ("final variables", 110, "v = text * 5\nprint(FINAL_VAR('v')[:10])"),
    ("model calls", 90, "llm_query(text); llm_query_batched([text] * 10)"),
    ("failing calls", 100, "llm_query('fail ' + text)"),
    ("tools", 100, "take(text, [big] * 3, k={'a': text})"),
    ("failing tools", 100, "for n in range(10):\n    try: fail(text)\n    except KeyError: pass"),
    (
        "unknown values",
        100,
        "for n in range(20):\n    try: take(object())\n    except Exception: pass",
    ),
    ("exits", 90, "raise SystemExit(text)"),
    ("traps", 40, "import os; os.abort()"),
    ("growth and rollback", 20, "x = bytearray(40_000_000); import os; os._exit(1)"),
    ("growth", 40, "x = bytearray(20_000_000); del x"),
    ("soft stops", 20, "while True: pass"),
    (
        "hard stops",
        20,
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ),
    ("sleeps", 90, "import time\nfor n in range(20): time.sleep(0.0001)"),
    (
        "imports",
        90,
        "import sys\nfor name in ('csv', 'wave', 'colorsys'):\n    sys.modules.pop(name, None); __import__(name)",
    ),
    ("lies", 90, "import _host\n_host.call(b'garbage')"),
    (
        "late lies",
        90,
        "import _host\nh = b'{\"op\":\"lm\",\"prompts\":[\"' + big + b'\"]}'\n_host.call(len(h).to_bytes(4, 'big') + h)",
    ),
];

/// Descriptors and threads of this process, and its own memory in bytes.
fn spent() -> (usize, usize, u64) {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    let kilobytes: u64 = line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap();
    (count("/proc/self/fd"), count("/proc/self/task"), kilobytes << 10)
}

/// What the process has when the session has nothing: its own pages are its own, and come and go.
async fn settled(session: &mut WasmEnvironment) -> (usize, usize, u64) {
    session.reset().await.unwrap();
    // Slots and files are given back in the background.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let spent = spent();
    session.execute(BEGIN).await.unwrap();
    spent
}

fn options(bait: &Bait) -> EnvironmentOptions {
    let limits = Limits {
        compute: Duration::from_millis(60),
        grace: Duration::from_millis(20),
        wall: Duration::from_secs(5),
        ..Limits::default()
    };
    let tools = vec![
        Tool::new("take", |_| Ok(Value::None)),
        Tool::new("fail", |call| Err(ToolError::of_type("KeyError", format!("{:?}", call.args)))),
    ];
    let lm = ScriptedHandler::echo();
    EnvironmentOptions { limits, tools, lm: Some(Arc::new(lm)), ..bait.options() }
}

/// What is done to a session from outside: name, how often, which.
const METHODS: &[(&str, usize)] = &[
    ("contexts", 100),
    ("variables out and in", 200),
    ("lists of variables", 200),
    ("snapshots", 100),
    ("restores", 100),
    ("forks", 40),
    ("resets", 100),
    ("hibernations", 30),
    ("sessions", 100),
    ("interrupts", 100),
    ("dropped cells", 60),
];

async fn call(session: &mut WasmEnvironment, name: &str, bait: &Bait) {
    match name {
        "contexts" => {
            let text = Context::Text(vec![b'x'; 200_000]);
            session.add_context(text, Some(3)).await.unwrap();
        }
        "variables out and in" => {
            let value = session.get_variable("text").await.unwrap().unwrap();
            session.set_variable("again", value).await.unwrap();
        }
        "lists of variables" => assert!(!session.list_variables().await.unwrap().is_empty()),
        "snapshots" => drop(session.snapshot().await.unwrap()),
        "restores" => {
            let snapshot = session.snapshot().await.unwrap();
            session.execute("x = text * 10").await.unwrap();
            session.restore(&snapshot).await.unwrap();
        }
        "forks" => {
            let mut fork = session.fork_session().await.unwrap();
            fork.execute("x = text * 10").await.unwrap();
        }
        "resets" => {
            session.reset().await.unwrap();
            session.execute(BEGIN).await.unwrap();
        }
        "hibernations" => drop(session.hibernate().await.unwrap()),
        "sessions" => drop(open(options(bait)).execute("x = 'x' * 100_000").await.unwrap()),
        "interrupts" => {
            let interrupt = session.interrupt();
            let (cell, ()) = tokio::join!(session.execute("while True: pass"), async {
                tokio::task::yield_now().await;
                interrupt.interrupt();
            });
            cell.unwrap();
        }
        "dropped cells" => {
            let cell = session.execute("x = text * 50\nwhile True: pass");
            let _ = tokio::time::timeout(Duration::from_millis(5), cell).await;
        }
        other => panic!("no action {other}"),
    }
}

const BEGIN: &str = "big = b'x' * 100_000; text = 'x' * 100_000";

/// Alone in its process, so that nobody else's memory is counted: see the test below.
#[tokio::test]
#[ignore = "run by `no_action_costs_the_host_memory`, in a process of its own"]
async fn alone() {
    let bait = Bait::new();
    let mut wrong = Vec::new();
    let actions = CELLS.iter().map(|(name, times, code)| (*name, *times, Some(*code)));
    for (name, times, code) in
        actions.chain(METHODS.iter().map(|(name, times)| (*name, *times, None)))
    {
        let mut session = open(options(&bait));
        session.execute(BEGIN).await.unwrap();
        let mut before = spent();
        let warm_up = WARM_UP.max(times / 2);
        for number in 0..warm_up + times {
            if number == warm_up {
                before = settled(&mut session).await;
            }
            match code {
                // Lies are an error of the host's, and all that can come of them.
                Some(code) => drop(session.execute(code).await),
                None => call(&mut session, name, &bait).await,
            }
        }
        let after = settled(&mut session).await;
        let grown = after.2.saturating_sub(before.2);
        println!("{name}: {} KiB, {} descriptors, {} threads", grown >> 10, after.0, after.1);
        if grown > GROWTH_MAX || after.0 > before.0 + 40 || after.1 > before.1 + 64 {
            wrong.push(format!("{name}: {before:?} became {after:?}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    println!("all {} actions", CELLS.len() + METHODS.len());
}

#[test]
#[cfg(target_os = "linux")]
fn no_action_costs_the_host_memory() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "host_memory::alone", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("\nall "), "{text}{errors}");
}
