//! What the host does for one action of a cell is bounded, and so is the time until a limit ends it.
//! Meanwhile a neighbour on the same thread keeps answering.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kaa::lm::ScriptedHandler;
use kaa::{
    Environment, EnvironmentExt, EnvironmentOptions, ExecuteOptions, Limits, Outcome, Tool, Value,
};

use super::bait::Bait;
use super::common::{open, run, session};

const LIMITS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(100));
/// From the limit on, with what a busy machine adds: a multiple of what is seen.
const SLACK: Duration = Duration::from_secs(10);
/// A cell of the neighbour's, likewise. It takes a tenth of a millisecond alone.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Fills the disk with empty files, among which the host has to look for room.
const FILL: &str = "import os\nf = open('/tmp/f', 'w')\nos.mkdir('/tmp/many')\nn = 0\ntry:\n    \
    while True:\n        n += 1; open(f'/tmp/many/{n}', 'w').close()\nexcept OSError: pass";
/// What the names of cells begin with that are run on such a disk.
const FULL: &str = "disk full of files";

/// Repeats a call that finds no room.
macro_rules! full {
    ($call:literal) => {
        concat!("while True:\n    try: ", $call, "\n    except OSError: pass")
    };
}

/// Name, and a cell that repeats it for ever, or does it once if that takes long enough.
const CELLS: &[(&str, &str)] = &[
    (
        "many components",
        "import os\np = '/tmp/' + 'd/../' * 100_000\nwhile True:\n    try: os.stat(p)\n    except OSError: pass",
    ),
    (
        "deep path",
        "import os\np = '/tmp'\nfor n in range(250):\n    p += '/d'\n    os.mkdir(p)\nwhile True: os.stat(p)",
    ),
    (
        "large directory",
        "import os\nfor n in range(5000): open(f'/tmp/{n}', 'w').close()\nwhile True: os.listdir('/tmp')",
    ),
    ("stat of many", "import os\nwhile True: [e.stat() for e in os.scandir('/usr/local/lib')]"),
    (
        "links in a circle",
        "import os\nfor n in range(50): os.symlink(f'l{n + 1}', f'/tmp/l{n}')\nwhile True:\n    try: os.stat('/tmp/l0')\n    except OSError: pass",
    ),
    ("randomness", "import os\nwhile True: os.urandom(100_000_000)"),
    (
        "syncs",
        "import os\nf = open('/tmp/f', 'wb')\nwhile True:\n    f.write(b'x' * 100_000); f.flush(); os.fsync(f.fileno()); f.seek(0)",
    ),
    ("whole disk", "while True:\n    with open('/tmp/f', 'wb') as f: f.write(bytes(60_000_000))"),
    (
        "full disk",
        "import os\nf = open('/tmp/f', 'wb'); f.write(bytes(60_000_000)); f.flush()\nwhile True:\n    try: f.write(bytes(8_000_000)); f.flush()\n    except OSError: pass",
    ),
    ("disk full of files, mkdir", full!("os.mkdir('/tmp/x')")),
    ("disk full of files, open", full!("open('/tmp/x', 'w')")),
    ("disk full of files, symlink", full!("os.symlink('x', '/tmp/x')")),
    ("disk full of files, link", full!("os.link('/tmp/many/1', '/tmp/x')")),
    ("disk full of files, truncate", full!("os.truncate('/tmp/many/1', 15_000_000)")),
    (
        "truncation",
        "import os\nf = open('/tmp/f', 'wb')\nwhile True: f.truncate(1 << 25); f.truncate(0)",
    ),
    ("output", "import os\nb = bytes(50_000_000)\nwhile True: os.write(1, b)"),
    (
        "vectors",
        "import os\nb = [bytes(100_000)] * 1000\nwhile True:\n    try: os.writev(1, b)\n    except (OSError, AttributeError): os.write(1, b[0])",
    ),
    ("reads", "f = open('/usr/local/lib/python315.zip', 'rb')\nwhile True: f.seek(0); f.read()"),
    (
        "polls",
        "import select\nwhile True:\n    try: select.select([0] * 500, [1] * 500, [], 0)\n    except (OSError, ValueError): pass",
    ),
    (
        "many polls",
        "import select\np = select.poll()\nfor n in range(1000): p.register(n, 7)\nwhile True:\n    try: p.poll(1000)\n    except OSError: pass",
    ),
    ("yields", "import time\nwhile True: time.sleep(0)"),
    ("short sleeps", "import time\nwhile True: time.sleep(0.000001)"),
    ("long sleep", "import time\ntime.sleep(1e9)"),
    ("clocks", "import time\nwhile True: time.time(); time.monotonic(); time.clock_getres(0)"),
    ("large calls", "t = 'x' * 50_000_000\nwhile True: take(t)"),
    ("many calls", "while True: take(1)"),
    (
        "deep arguments",
        "x = []\nfor n in range(150): x = [x, x[:1]]\nwhile True:\n    try: take(x)\n    except RuntimeError: pass",
    ),
    ("wide arguments", "x = [[n, str(n)] for n in range(200_000)]\nwhile True: take(x)"),
    ("large numbers", "x = 10 ** 99_999\nwhile True: take(x)"),
    ("prompts", "t = ['x' * 1_000_000] * 50\nwhile True: llm_query_batched(t)"),
    (
        "lies",
        "import _host\nh = b'{\"op\":\"why\",\"x\":[' + b','.join([b'[]'] * 400_000) + b']}'\nf = len(h).to_bytes(4, 'big') + h\nwhile True: _host.call(f)",
    ),
    (
        "large frame",
        "import _host\nh = b'{\"op\":\"why\"}'\nf = len(h).to_bytes(4, 'big') + h + bytes(60_000_000)\nwhile True: _host.call(f)",
    ),
    ("answers", "while True: answer['content'] = 'x' * 10_000_000; answer['ready'] = True"),
    ("regular expression", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')"),
    ("big power", "x = 7 ** 10 ** 8"),
    ("big product", "x = 1 << 100_000_000\nx * (x + 1)"),
    ("sum of C", "sum(range(10 ** 12))"),
    ("in C", "10 ** 12 in iter(int, 1)"),
    ("sort", "x = list(range(3_000_000))\nwhile True: sorted(x, key=lambda n: -n)"),
    ("collector", "import gc\nx = [[n] for n in range(500_000)]\nwhile True: gc.collect()"),
    (
        "compiler",
        "s = '+'.join(['x'] * 200_000)\nwhile True:\n    try: compile(s, 's', 'eval')\n    except RecursionError: compile('x\\n' * 200_000, 's', 'exec')",
    ),
    ("opens", "while True:\n    try: open('/tmp/f', 'w').close()\n    except OSError: pass"),
    ("hash collisions", "d = {}\nm = 2 ** 61 - 1\nfor n in range(10 ** 6): d[n * m] = n"),
    ("memory", "while True: x = bytearray(200_000_000); del x"),
];

#[tokio::test]
async fn every_action_ends_at_its_limit_and_the_neighbour_goes_on() {
    let bait = Bait::new();
    let limits = Limits {
        compute: LIMITS.0,
        wall: LIMITS.0 * 2,
        grace: LIMITS.1,
        tool_calls: 1_000_000_000,
        lm_calls: 1_000_000_000,
        ..Limits::default()
    };
    let options = EnvironmentOptions {
        limits,
        tools: vec![Tool::new("take", |_| Ok(Value::None))],
        lm: Some(Arc::new(ScriptedHandler::echo())),
        ..bait.options()
    };
    let mut neighbour = session();
    run(&mut neighbour, "count = 0").await;
    let mut wrong = Vec::new();
    for mounts in [options.policy.mounts.clone(), Vec::new()] {
        let mut options = options.clone();
        // With mounts files are the work of other threads, without they are done in place.
        let with = if mounts.is_empty() { "without mounts" } else { "with mounts" };
        let files = [
            "path",
            "components",
            "directory",
            "stat",
            "links",
            "sync",
            "disk",
            "trunc",
            "reads",
            "opens",
        ];
        options.policy.mounts = mounts;
        for (name, code) in CELLS {
            let is_of_files = files.iter().any(|word| name.contains(word));
            if !options.policy.mounts.is_empty() && !is_of_files {
                continue;
            }
            let mut options = options.clone();
            if name.starts_with(FULL) {
                // It takes long to fill a larger one.
                options.limits.disk_bytes = 16 << 20;
            }
            let mut session = open(options);
            let prepare = if name.starts_with(FULL) { FILL } else { "pass" };
            let unhurried = ExecuteOptions { limits: Some(Limits::default()) };
            let prepared = session.execute_opts(prepare, unhurried).await.unwrap();
            assert_eq!(prepared.outcome, Outcome::Completed, "{name}: {prepared:?}");
            let over = AtomicBool::new(false);
            let attack = async {
                let since = Instant::now();
                let ended = session.execute(code).await;
                over.store(true, Ordering::Release);
                (since.elapsed(), ended)
            };
            let live = async {
                let mut longest = Duration::ZERO;
                while !over.load(Ordering::Acquire) {
                    let since = Instant::now();
                    run(&mut neighbour, "count += 1").await;
                    longest = longest.max(since.elapsed());
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                longest
            };
            let ((took, ended), longest) = tokio::join!(attack, live);
            println!("{name} {with}: {took:.0?}, the neighbour waits for {longest:.0?} at most");
            let Ok(cell) = ended else {
                wrong.push(format!("{name}: {ended:?}"));
                continue;
            };
            if took > LIMITS.0 * 2 + LIMITS.1 + SLACK || longest > ANSWER_MAX {
                wrong
                    .push(format!("{name} {with}: {took:?}, the neighbour waited for {longest:?}"));
            }
            if cell.limit.is_none() {
                wrong.push(format!("{name} {with}: {:?} {:?}", cell.outcome, cell.exception));
            }
            run(&mut session, "1 + 1").await;
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
