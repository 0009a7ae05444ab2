//! Each limit: just under passes, over stops with the right name, and what was before is there.

mod common;

use std::time::{Duration, Instant};

use common::{limited, open, print, run};
use kaa::{
    Clock, Environment, EnvironmentExt, EnvironmentOptions, ExecuteOptions, Limit, Limits, Outcome,
    Policy, Tool, Value,
};

const WORK: &str = "n = 0\nfor i in range(100_000): n += i";

#[tokio::test]
async fn fuel_is_met_to_the_unit_and_deterministic() {
    let policy = Policy { seed: Some(1), clock: Clock::Fixed(0), ..Policy::default() };
    let options = |fuel| EnvironmentOptions {
        limits: Limits { fuel, ..Limits::default() },
        policy: policy.clone(),
        ..EnvironmentOptions::default()
    };
    let ample = run(&mut open(options(1 << 40)), WORK).await.usage.fuel.unwrap();
    let again = run(&mut open(options(1 << 40)), WORK).await.usage.fuel.unwrap();
    assert_eq!(ample, again);
    let enough = run(&mut open(options(ample + 1)), WORK).await;
    assert_eq!((enough.outcome, enough.usage.fuel), (Outcome::Completed, Some(ample)));
    let mut short = open(options(ample / 2));
    let stopped = run(&mut short, WORK).await;
    assert_eq!((stopped.outcome, stopped.limit), (Outcome::LimitReached, Some(Limit::Fuel)));
    let spent = stopped.usage.fuel.unwrap();
    assert!(spent >= ample / 2 && spent < ample, "{spent} of {ample}");
    let mut same = open(options(ample / 2));
    let same = run(&mut same, WORK).await;
    assert_eq!(same.usage.fuel, stopped.usage.fuel);
    assert_eq!(same.stderr, stopped.stderr);
    // What the cell had made until then is kept.
    assert_eq!(print(&mut short, "print(0 < n < 4999950000)").await, "True\n");
}

/// The fuel of a turn is spent from its start on: by the agent, which sets a new session up, and then
/// by the cell.
#[tokio::test]
async fn a_limit_that_is_reached_before_the_cell_begins_stops_it_softly() {
    for fuel in [1, 1_000, 30_000, 100_000, 200_000, 300_000, 400_000, 1_000_000] {
        let limits = Limits { fuel, ..Limits::default() };
        let mut session = limited(limits);
        for code in ["while True: pass", "try:\n    while True: pass\nfinally: done = 1"] {
            let stopped = run(&mut session, code).await;
            let expected = (Outcome::LimitReached, Some(Limit::Fuel), false);
            let found = (stopped.outcome, stopped.limit, stopped.rolled_back);
            assert_eq!(found, expected, "{fuel}: {code}: {}", stopped.stderr.text());
        }
        // Whatever came late, it isn't the next cell's.
        let options = ExecuteOptions { limits: Some(Limits::default()) };
        let after = session.execute_opts("'after'", options).await.unwrap();
        assert_eq!((after.outcome, after.limit), (Outcome::Completed, None));
    }
}

#[tokio::test]
async fn going_back_from_a_grown_memory_takes_nothing_of_the_limit() {
    let limits = Limits { memory_bytes: 64 << 20, ..Limits::default() };
    let mut session = limited(limits);
    run(&mut session, "keep = 41").await;
    let snapshot = session.snapshot().await.unwrap();
    // Each time with a new instance, since a memory doesn't shrink.
    for round in 0..40 {
        let grown = run(&mut session, "large = bytearray(20_000_000)").await;
        assert_eq!(grown.outcome, Outcome::Completed, "{round}: {}", grown.stderr.text());
        session.restore(&snapshot).await.unwrap();
    }
    assert_eq!(print(&mut session, "print(keep)").await, "41\n");
}

#[tokio::test]
async fn bulk_work_costs_fuel() {
    let mut session = common::session();
    run(&mut session, "b = bytes(50_000_000)").await;
    let small = run(&mut session, "c = b[:1000] + b'x'").await.usage.fuel.unwrap();
    let large = run(&mut session, "c = b + b'x'").await.usage.fuel.unwrap();
    assert!(large > small + 50_000_000 / 16, "{small} {large}");
}

#[tokio::test]
async fn wall_reaches_sleeps_lm_calls_and_tools() {
    let never = Tool::new_async("never", |_| std::future::pending());
    let mut session = open(EnvironmentOptions {
        limits: Limits {
            wall: Duration::from_millis(100),
            grace: Duration::from_millis(100),
            ..Limits::default()
        },
        tools: vec![never],
        ..EnvironmentOptions::default()
    });
    run(&mut session, "keep = 41").await;
    for (code, rolled_back) in [
        ("import time; time.sleep(100)", false),
        ("import asyncio; asyncio.run(asyncio.sleep(100))", false),
        ("never()", false),
        ("while True:\n    try: never()\n    except BaseException: pass", true),
    ] {
        let started = Instant::now();
        let stopped = run(&mut session, code).await;
        assert_eq!(
            (stopped.limit, stopped.rolled_back),
            (Some(Limit::Wall), rolled_back),
            "{code}"
        );
        assert!(started.elapsed() < Duration::from_secs(2), "{code}: {:?}", started.elapsed());
        assert_eq!(print(&mut session, "print(keep)").await, "41\n");
    }
}

#[tokio::test]
async fn memory_beyond_the_limit_is_a_memory_error() {
    let mut session = limited(Limits { memory_bytes: 128 << 20, ..Limits::default() });
    run(&mut session, "keep = 41").await;
    assert_eq!(run(&mut session, "b = bytes(30_000_000)").await.outcome, Outcome::Completed);
    let over = run(&mut session, "c = bytes(120_000_000)").await;
    assert_eq!(over.exception.unwrap().type_name, "MemoryError");
    assert!(over.usage.memory_bytes <= 128 << 20);
    let caught = "try: bytes(120_000_000)\nexcept MemoryError: print('caught', keep)";
    assert_eq!(print(&mut session, caught).await, "caught 41\n");
}

#[tokio::test]
async fn a_cell_that_fills_its_memory_is_a_memory_error() {
    let fillers = [
        "y = []\nfor i in range(10**9): y.append([i])",
        "def f():\n    y = []\n    for i in range(10**9): y.append([i])\nf()",
        "y = {}\nfor i in range(10**9): y[i] = str(i)",
        "y = b''\nwhile True: y += bytes(1 << 20)",
        "y = None\nwhile True: y = [y]",
        "y = []\ntry:\n    while True: y.append(bytes(100))\nexcept MemoryError: print('full')",
    ];
    let mut wrong = Vec::new();
    for mib in [80, 96, 101, 128] {
        let mut session = limited(Limits { memory_bytes: mib << 20, ..Limits::default() });
        run(&mut session, "keep = 41").await;
        for code in fillers {
            let full = run(&mut session, code).await;
            let is_caught = full.outcome == Outcome::Completed && full.stdout.text() == "full\n";
            let name = full.exception.as_ref().map_or("", |exception| &exception.type_name);
            // Where CPython itself doesn't get over it, it's a trap.
            let is_right = match full.outcome {
                Outcome::Raised => name == "MemoryError",
                Outcome::Exited { code: 134 } => full.rolled_back,
                _ => is_caught,
            };
            // What the cell left is still there, unless there was no room for its report.
            let free = run(&mut session, "y = None").await;
            let after = run(&mut session, "print(keep, y)").await;
            if !is_right || free.outcome != Outcome::Completed || after.stdout.text() != "41 None\n"
            {
                wrong.push(format!(
                    "{mib} MiB: {code}: {:?} {} {}\nthen {:?} {}\nthen {:?} {}",
                    full.outcome,
                    full.rolled_back,
                    full.stderr.text(),
                    free.outcome,
                    free.stderr.text(),
                    after.outcome,
                    after.stderr.text()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[tokio::test]
async fn calls_are_counted_per_cell() {
    let tool = Tool::new("t", |_| Ok(Value::None));
    let mut session = open(EnvironmentOptions {
        limits: Limits { tool_calls: 3, ..Limits::default() },
        tools: vec![tool],
        ..EnvironmentOptions::default()
    });
    for _ in 0..2 {
        let enough = run(&mut session, "for _ in range(3): t()").await;
        assert_eq!((enough.outcome, enough.usage.tool_calls), (Outcome::Completed, 3));
    }
    let over = run(&mut session, "for _ in range(4): t()").await;
    let exception = over.exception.unwrap();
    assert_eq!(exception.type_name, "RuntimeError");
    assert!(exception.message.contains("tool call limit exceeded: 3"), "{}", exception.message);
}

#[tokio::test]
async fn the_scratch_directory_has_a_quota() {
    let mut session = limited(Limits { disk_bytes: 1 << 20, ..Limits::default() });
    let code = "
import os
with open('/tmp/a', 'wb') as f: f.write(b'x' * 900_000)
try:
    with open('/tmp/b', 'wb') as f: f.write(b'x' * 900_000)
except OSError as e: print(e.errno == __import__('errno').ENOSPC)
os.remove('/tmp/a')
if os.path.exists('/tmp/b'): os.remove('/tmp/b')
with open('/tmp/c', 'wb') as f: f.write(b'x' * 900_000)
print(os.path.getsize('/tmp/c'))
try:
    for i in range(100_000): open(f'/tmp/f{i}', 'w').close()
except OSError as e: print('files', i < 1000)
try:
    os.truncate('/tmp/c', 10**12)
except OSError as e: print('sparse')
";
    assert_eq!(print(&mut session, code).await, "True\n900000\nfiles True\nsparse\n");
}

#[tokio::test]
async fn seeds_and_clocks_make_sessions_reproducible() {
    let code = "
import random, os, uuid, time, datetime
print(random.random(), os.urandom(8).hex(), uuid.uuid4(), time.time(), time.monotonic(), datetime.datetime.now())
time.sleep(3600)
print(time.time())
for x in {'a', 'b', 'c', 'd'}: print(x, end='')
";
    let policy = Policy {
        seed: Some(7),
        clock: Clock::Fixed(1_000_000_000_000_000_000),
        ..Policy::default()
    };
    let reproducible =
        || open(EnvironmentOptions { policy: policy.clone(), ..EnvironmentOptions::default() });
    let first = run(&mut reproducible(), code).await;
    let second = run(&mut reproducible(), code).await;
    assert_eq!(first.stdout, second.stdout);
    assert_eq!(first.usage.fuel, second.usage.fuel);
    assert!(first.stdout.text().contains("2001-09-09"), "{}", first.stdout.text());
    assert!(first.usage.wall < Duration::from_secs(60));
    let free =
        run(&mut common::session(), "import random, os\nprint(random.random(), os.urandom(8))")
            .await;
    let other =
        run(&mut common::session(), "import random, os\nprint(random.random(), os.urandom(8))")
            .await;
    assert_ne!(free.stdout, other.stdout);
}

#[tokio::test(flavor = "current_thread")]
async fn sessions_share_a_thread_fairly() {
    let mut busy = limited(Limits { compute: Duration::from_secs(5), ..Limits::default() });
    let mut quick = common::session();
    run(&mut quick, "1").await;
    let interrupt = busy.interrupt();
    let spinning = tokio::spawn(async move { busy.execute("while True: pass").await.unwrap() });
    tokio::task::yield_now().await;
    let started = Instant::now();
    for _ in 0..10 {
        run(&mut quick, "sum(range(1000))").await;
    }
    // On one thread the spinning session ran for a few slices in between, not to its limit.
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(!spinning.is_finished());
    interrupt.interrupt();
    assert_eq!(spinning.await.unwrap().outcome, Outcome::Raised);
}
