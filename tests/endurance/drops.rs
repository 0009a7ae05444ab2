//! Futures and sessions that are dropped in the middle of things.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use kaa::{Context, Environment, EnvironmentExt, Value, WasmEnvironment};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::sessions::print;
use crate::world::World;

/// Cells that don't end by themselves, computing or waiting, and some that end soon.
const CELLS: &[&str] = &[
    "while True: n += 1",
    "n = 1\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "n = 1; import time; time.sleep(100)",
    "n = 1; llm_query('never')",
    "n = 1; llm_query_batched(['never'] * 20)",
    "n = 1; never()",
    "n = 1; x = bytearray(b'x' * 6_000_000); llm_query('slow 1')",
    "n = 1; x = [bytes([k % 256]) * 600 for k in range(10_000)]",
    "n = 1\nwhile True: open('/tmp/f', 'w').write('x' * 1000)",
    "n = 1\nwhile True: double(n)",
    "n = 1; print('x' * 10_000_000)",
];

/// Polls a future for a while, and gives it up, if it hasn't ended by then.
async fn give_up<F: Future>(future: F, rng: &mut StdRng) -> Option<F::Output> {
    if rng.random_bool(0.5) {
        let time = Duration::from_micros(rng.random_range(0..6_000));
        return tokio::time::timeout(time, future).await.ok();
    }
    // Some polls: that's where what is done in several steps is between two of them.
    let mut future = pin!(future);
    for _ in 0..rng.random_range(0..12) {
        let polled = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
        if let Poll::Ready(output) = polled.await {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// A cell is given up; then its session is dropped, or has what it had before.
pub(crate) async fn cell(world: &World, rng: &mut StdRng) {
    let mut session = world.runtime.environment(&world.base, world.options(rng)).unwrap();
    world.tally.note("sessions");
    if rng.random_bool(0.9) {
        print(&mut session, "n = 0; kept = list(range(1000))").await;
    }
    let code = CELLS[rng.random_range(0..CELLS.len())];
    let given_up = give_up(session.execute(code), rng).await.is_none();
    world.tally.note(if given_up { "cells dropped" } else { "cells that were faster" });
    if given_up && rng.random_bool(0.5) {
        let code = "print((n, len(kept)) if 'kept' in globals() else None)";
        let found = print(&mut session, code).await;
        assert!(found == "(0, 1000)\n" || found == "None\n", "{code}: {found}");
    }
}

/// A session is dropped right after a cell, while its checkpoint is taken.
pub(crate) async fn checkpoint(world: &World, rng: &mut StdRng) {
    let mut session = world.runtime.environment(&world.base, world.plain()).unwrap();
    world.tally.note("sessions");
    let size = [1, 1000, 100_000, 5_000_000, 9_000_000, 20_000_000][rng.random_range(0..6)];
    print(&mut session, &format!("x = bytearray(b'x' * {size})")).await;
    for _ in 0..rng.random_range(0..4) {
        tokio::task::yield_now().await;
    }
    world.tally.note("dropped at a checkpoint");
}

/// Whatever isn't a cell is given up.
pub(crate) async fn others(world: &World, rng: &mut StdRng) {
    let mut session = world.runtime.environment(&world.base, world.plain()).unwrap();
    world.tally.note("sessions");
    print(&mut session, "kept = list(range(1000)); x = bytearray(b'x' * 2_000_000)").await;
    let snapshot = session.snapshot().await.unwrap();
    for _ in 0..rng.random_range(1..4) {
        match rng.random_range(0..8) {
            0 => drop(give_up(session.fork(), rng).await),
            1 => drop(give_up(session.snapshot(), rng).await),
            2 => drop(give_up(session.hibernate(), rng).await),
            3 => {
                let context = Context::Text(vec![b'c'; 3_000_000]);
                drop(give_up(session.add_context(context, Some(0)), rng).await);
            }
            4 => drop(give_up(session.set_variable("v", Value::Int(1)), rng).await),
            5 => drop(give_up(session.restore(&snapshot), rng).await),
            6 => drop(give_up(session.list_variables(), rng).await),
            _ => {
                session.hibernate().await.unwrap();
                drop(give_up(session.execute("1"), rng).await);
            }
        }
        world.tally.note("other calls dropped");
    }
    if rng.random_bool(0.7) {
        assert_eq!(print(&mut session, "print(len(kept), len(x))").await, "1000 2000000\n");
    }
}

/// A session of the pool is dropped while it's on its way to disk, or back.
pub(crate) async fn pooled(world: &World, rng: &mut StdRng) {
    let mut session = world.pool.environment(&world.base, world.plain()).await.unwrap();
    world.tally.note("sessions");
    print(&mut session, "kept = 5; x = bytearray(b'x' * 2_000_000)").await;
    tokio::time::sleep(crate::world::IDLE.mul_f64(rng.random_range(0.5..1.5))).await;
    drop(give_up(session.execute("while True: pass"), rng).await);
    world.tally.note("dropped in the pool");
    if rng.random_bool(0.5) {
        assert_eq!(print(&mut session, "print(kept)").await, "5\n");
    }
}

/// The embedder's own code panics while a cell waits for it: the task is lost, and nothing else.
pub(crate) async fn panics(world: &World) {
    let mut session = world.runtime.environment(&world.base, world.plain()).unwrap();
    world.tally.note("sessions");
    let task = tokio::spawn(async move { session.execute("llm_query('panic')").await });
    assert!(task.await.unwrap_err().is_panic());
    world.tally.note("models that panicked");
}

/// A task with a session is aborted from elsewhere.
pub(crate) async fn aborted(world: &Arc<World>, rng: &mut StdRng) {
    let mut session: WasmEnvironment =
        world.runtime.environment(&world.base, world.options(rng)).unwrap();
    world.tally.note("sessions");
    let code = CELLS[rng.random_range(0..CELLS.len())];
    let task = tokio::spawn(async move { session.execute(code).await.map(drop) });
    tokio::time::sleep(Duration::from_micros(rng.random_range(0..5_000))).await;
    task.abort();
    drop(task.await);
    world.tally.note("tasks aborted");
}
