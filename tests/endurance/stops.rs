//! Every way for a cell to be stopped, and what is left of its session.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest};
use kaa::{
    Environment, EnvironmentExt, EnvironmentOptions, ExecuteOptions, Execution, Limit, Limits,
    Outcome, Tool, Value,
};

use tokio::sync::Notify;

use crate::world::World;

/// What a stop comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum End {
    /// An exception that the cell could have caught; what it had done stays.
    Soft(Limit),
    /// The state before the cell.
    Hard(Limit),
    Raises(&'static str),
    /// Rolled back.
    Exits(i32),
    /// The cell goes on without what it was refused, and prints this first.
    Prints(&'static str),
}

/// One way to be stopped.
pub(crate) struct Stop {
    /// The field of [`Limits`], or what else stops the cell.
    pub(crate) by: &'static str,
    /// Makes that limit tight.
    pub(crate) tighten: fn(&mut Limits),
    pub(crate) code: &'static str,
    pub(crate) end: End,
}

const fn stop(by: &'static str, tighten: fn(&mut Limits), code: &'static str, end: End) -> Stop {
    Stop { by, tighten, code, end }
}

const ENDLESS: &str = "marks.append(1)\nwhile True: pass";
const STUBBORN: &str = "while True:\n    try:\n        marks.append(1)\n        while True: pass\n    \
                        except BaseException: pass";

pub(crate) const STOPS: &[Stop] = &[
    stop("fuel", fuel, ENDLESS, End::Soft(Limit::Fuel)),
    stop("fuel", fuel_and_grace, STUBBORN, End::Hard(Limit::Fuel)),
    stop("compute", compute, ENDLESS, End::Soft(Limit::Compute)),
    stop("compute", compute_and_grace, STUBBORN, End::Hard(Limit::Compute)),
    stop("compute", compute, "sum(x for x in iter(int, 1))", End::Soft(Limit::Compute)),
    stop(
        "compute",
        compute,
        "import re; re.match('(a+)+$', 'a'*40 + 'b')",
        End::Soft(Limit::Compute),
    ),
    stop("wall", wall, "import time; time.sleep(100)", End::Soft(Limit::Wall)),
    stop("wall", wall, "llm_query('never')", End::Soft(Limit::Wall)),
    stop("wall", wall, "never()", End::Soft(Limit::Wall)),
    stop(
        "wall",
        wall_and_grace,
        "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        End::Hard(Limit::Wall),
    ),
    // It yields within the grace, after some work.
    stop(
        "grace",
        compute,
        "try:\n    while True: pass\nfinally: marks.append(sum(range(1000)))",
        End::Soft(Limit::Compute),
    ),
    stop("grace", compute_and_grace, STUBBORN, End::Hard(Limit::Compute)),
    stop("memory_bytes", memory, "x = bytearray(100_000_000)", End::Raises("MemoryError")),
    stop(
        "memory_bytes",
        memory,
        "def fill():\n    x = []\n    while True: x.append(bytes(100_000))\nfill()",
        End::Raises("MemoryError"),
    ),
    stop("output_bytes", output, "print('x' * 100)", End::Prints("xxxxxxxx")),
    stop(
        "lm_calls",
        lm_calls,
        "for _ in range(3): a = llm_query('a')\nprint(a)",
        End::Prints("Error: LM call limit exceeded"),
    ),
    stop(
        "lm_concurrency",
        lm_concurrency,
        "print(set(llm_query_batched(['at once'] * 7)))",
        End::Prints("{'at most 2'}"),
    ),
    stop("tool_calls", tool_calls, "for n in range(4): double(n)", End::Raises("RuntimeError")),
    stop(
        "disk_bytes",
        disk,
        "open('/tmp/full', 'wb').write(b'x' * 3_000_000)",
        End::Raises("OSError"),
    ),
    stop(
        INTERRUPT,
        usual,
        "marks.append(1); begun()\nwhile True: pass",
        End::Soft(Limit::Interrupt),
    ),
    stop(INTERRUPT, usual, "import time; begun(); time.sleep(100)", End::Soft(Limit::Interrupt)),
    stop(
        INTERRUPT,
        grace,
        "while True:\n    try:\n        begun()\n        while True: pass\n    except BaseException: pass",
        End::Hard(Limit::Interrupt),
    ),
    stop("recursion", usual, "def f(): return f()\nf()", End::Raises("RecursionError")),
    stop(
        "recursion",
        usual,
        "import json; json.loads('[' * 200_000)",
        End::Raises("RecursionError"),
    ),
    stop("trap", usual, "import os; os.abort()", End::Exits(134)),
    stop("trap", usual, "x = []\nfor _ in range(200_000): x = [x]\nx = None", End::Exits(134)),
    stop("exit", usual, "import os; os._exit(3)", End::Exits(3)),
];

/// Not a limit of the session's.
const INTERRUPT: &str = "interrupt";

fn usual(_: &mut Limits) {}

fn fuel(limits: &mut Limits) {
    limits.fuel = 20_000_000;
}

fn compute(limits: &mut Limits) {
    limits.compute = Duration::from_millis(15);
}

fn wall(limits: &mut Limits) {
    limits.wall = Duration::from_millis(20);
}

/// For cells that don't yield; those that do have the default, whatever the machine has to do.
fn grace(limits: &mut Limits) {
    limits.grace = Duration::from_millis(2);
}

fn fuel_and_grace(limits: &mut Limits) {
    fuel(limits);
    grace(limits);
}

fn compute_and_grace(limits: &mut Limits) {
    compute(limits);
    grace(limits);
}

fn wall_and_grace(limits: &mut Limits) {
    wall(limits);
    grace(limits);
}

fn memory(limits: &mut Limits) {
    limits.memory_bytes = 96 << 20;
}

fn output(limits: &mut Limits) {
    limits.output_bytes = 8;
}

fn lm_calls(limits: &mut Limits) {
    limits.lm_calls = 2;
}

fn lm_concurrency(limits: &mut Limits) {
    limits.lm_concurrency = 2;
}

fn tool_calls(limits: &mut Limits) {
    limits.tool_calls = 3;
}

fn disk(limits: &mut Limits) {
    limits.disk_bytes = 1 << 20;
}

/// A limit that is added to Kaa doesn't compile here before it's named, and then needs a stop.
pub(crate) fn every_limit_has_one() {
    macro_rules! names {
        ($($name:ident),*) => {{
            let Limits { $($name: _),* } = Limits::default();
            [$(stringify!($name)),*]
        }};
    }
    let names = names!(
        fuel,
        compute,
        wall,
        grace,
        memory_bytes,
        output_bytes,
        lm_calls,
        lm_concurrency,
        tool_calls,
        disk_bytes
    );
    for name in names.iter().chain(&[INTERRUPT]) {
        assert!(STOPS.iter().any(|stop| stop.by == *name), "nothing is stopped by {name}");
    }
}

/// A session that is stopped once, and then has what it had before.
pub(crate) async fn run(world: &World, stop: &Stop) {
    let mut options =
        EnvironmentOptions { lm: Some(Arc::new(Counted::default())), ..world.plain() };
    (stop.tighten)(&mut options.limits);
    let mut session = world.runtime.environment(&world.base, options).unwrap();
    world.tally.note("sessions");
    // The cells before and after have time, whatever the machine has to do.
    let ample = || ExecuteOptions { limits: Some(Limits::default()) };
    let ready = session.execute_opts("marks = []; keep = 41", ample()).await.unwrap();
    assert_eq!(ready.outcome, Outcome::Completed, "{}", ready.stderr.text());
    if stop.by == INTERRUPT {
        // An interrupt of a cell that has not begun is another thing.
        let begun = Arc::new(Notify::new());
        let tell = Arc::clone(&begun);
        let tool = Tool::new("begun", move |_| {
            tell.notify_one();
            Ok(Value::None)
        });
        session.register_tool(tool).unwrap();
        let stop = session.interrupt();
        tokio::spawn(async move {
            begun.notified().await;
            stop.interrupt();
        });
    }
    let stopped = session.execute(stop.code).await.unwrap();
    let after = session.execute_opts("print(keep, len(marks))", ample()).await.unwrap();
    let marked = stop.code.contains("marks") && matches!(stop.end, End::Soft(_));
    let expected = format!("41 {}\n", u8::from(marked));
    // On a busy machine time may be over before the cell's first statement: nothing can hold it there.
    let (limit, shows) = match stop.end {
        End::Soft(limit) => (Some(limit), marked),
        End::Hard(limit) => (Some(limit), true),
        _ => (None, false),
    };
    let is_early = shows
        && matches!(limit, Some(Limit::Compute | Limit::Wall))
        && (stopped.limit, stopped.rolled_back) == (limit, false)
        && after.stdout.text() == "41 0\n";
    if is_early {
        return world.tally.note("stopped before the cell began");
    }
    check(stop, &stopped);
    assert_eq!(after.stdout.text(), expected, "after {}", stop.code);
    world.tally.note(&name_of(stop));
}

fn kind(end: End) -> &'static str {
    match end {
        End::Soft(_) => "soft",
        End::Hard(_) => "hard",
        End::Raises(_) => "an exception",
        End::Exits(_) => "rolled back",
        End::Prints(_) => "refused",
    }
}

fn check(stop: &Stop, found: &Execution) {
    let type_name = found.exception.as_ref().map_or("", |exception| &exception.type_name);
    let is_right = match stop.end {
        End::Soft(limit) => found.limit == Some(limit) && !found.rolled_back,
        End::Hard(limit) => found.limit == Some(limit) && found.rolled_back,
        End::Raises(expected) => type_name == expected,
        End::Exits(code) => found.outcome == Outcome::Exited { code } && found.rolled_back,
        End::Prints(text) => found.stdout.text().starts_with(text),
    };
    assert!(is_right, "{}: {:?}, found {found:?}", stop.code, stop.end);
}

/// A model that tells how many calls it has at once.
#[derive(Default)]
struct Counted {
    now: AtomicUsize,
    most: AtomicUsize,
}

#[async_trait]
impl LmHandler for Counted {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        if request.prompt.to_text() == "never" {
            std::future::pending::<()>().await;
        }
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        let most = self.most.load(Ordering::SeqCst);
        let response = if most <= 2 { "at most 2".to_owned() } else { format!("{most}") };
        Ok(LmCompletion { model: "counted".into(), response, ..LmCompletion::default() })
    }
}

/// Stops that no cell had.
pub(crate) fn missing(tally: &BTreeMap<String, u64>) -> Vec<String> {
    let names = STOPS.iter().map(name_of);
    names.filter(|name| !tally.contains_key(name)).collect()
}

fn name_of(stop: &Stop) -> String {
    format!("stopped by {}, {}", stop.by, kind(stop.end))
}
