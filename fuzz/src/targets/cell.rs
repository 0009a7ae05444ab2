//! Any source as a cell of a session.
//!
//! An input is the source. What has to hold, whatever the cell does to itself, to its Python and to the
//! agent:
//! - it ends with a result, or as a breach of the protocol; the session stays ready;
//! - what it spent is within its limits: fuel and its grace, memory, output, calls;
//! - if it was rolled back, the session has what it had before it, to the last variable;
//! - whatever became of the session, going back to a snapshot makes it what it was: the same cell costs
//!   it the same fuel, to the unit;
//! - the same cell in another session, whose memory was a third one's before, does the same and costs the
//!   same fuel (one input in eight, since that takes as long as all of the above);
//! - what another session has stays as it is.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kaa::lm::ScriptedHandler;
use kaa::{
    Clock, Environment, EnvironmentExt, EnvironmentOptions, Error, Execution, Limit, Limits,
    Outcome, Policy, Snapshot, Status, Tool, Value, WasmEnvironment,
};
use tokio::runtime::Runtime;

use super::common::{open, run as run_cell};

const FUEL: u64 = 60_000_000;
const GRACE: Duration = Duration::from_millis(20);
/// With the grace, of a slice for each millisecond, and an operator that asks for as much as there can be:
/// it's charged before it is refused.
const FUEL_MAX: u64 = FUEL + 20 * 16_000_000 + (1 << 33);
/// Far above what that fuel takes.
const COMPUTE_MAX: Duration = Duration::from_secs(10);
const MEMORY_BYTES: u64 = 96 << 20;
const OUTPUT_BYTES: u64 = 4 << 10;
/// Sentences that the host adds to the output of a cell that it ended.
const OUTPUT_SLACK: usize = 1 << 10;
const LM_CALLS: u32 = 5;
const TOOL_CALLS: u32 = 5;
/// Far above the limits of time.
const TOO_LONG: Duration = Duration::from_secs(30);
/// One in so many inputs is also run by another session.
const TWIN_EVERY: u64 = 8;
/// Whether a guest yields within its grace is decided by the time that it takes, if that's ten times as
/// long: what took less than half of it is the same for two.
const TIMELY: Duration = Duration::from_millis(100);

const BEFORE: &str = "marker = 41\nkept = {'list': [1, 2], 'text': 'x' * 5000}";
const CHECK: &str = "print(marker, kept['list'], len(kept['text']))";
const CHECKED: &str = "41 [1, 2] 5000\n";
const OTHER: &str = "count += 1; print(count, len(state), state[77], open('/tmp/k').read())";

/// What goes on beside the input.
struct World {
    runtime: Runtime,
    session: WasmEnvironment,
    start: Snapshot,
    /// What [`CHECK`] costs.
    fuel: Option<u64>,
    other: WasmEnvironment,
    round: u64,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| Mutex::new(World::new()));

pub(crate) fn run(source: &[u8]) -> bool {
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let World { runtime, session, start, fuel, other, round } = &mut *world;
    let source = String::from_utf8_lossy(source);
    runtime.block_on(async {
        let since = Instant::now();
        let first = execute(session, &source).await;
        if first.as_ref().is_none_or(|cell| cell.rolled_back) {
            check(session, None).await;
        }
        // Whatever it left behind, there is a next cell, which may do anything as well.
        execute(session, "marker = 'gone'").await;
        session.restore(start).await.unwrap();
        check(session, *fuel).await;
        session.restore(start).await.unwrap();
        *round += 1;
        // The same ones each time, so that what is found is found again.
        let sum: u64 = source.bytes().map(u64::from).sum();
        if sum.is_multiple_of(TWIN_EVERY) {
            check_twin(first.as_ref(), &source).await;
        }
        let cell = run_cell(other, OTHER).await;
        assert_eq!(cell.stdout.text(), format!("{round} 1000 77 kept\n"));
        assert!(since.elapsed() < TOO_LONG, "{:?}", since.elapsed());
        first.is_some_and(|cell| cell.outcome == Outcome::Completed)
    })
}

impl World {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (session, start, fuel, other) = runtime.block_on(async {
            let mut session = begin().await;
            let start = session.snapshot().await.unwrap();
            let fuel = check(&mut session, None).await;
            session.restore(&start).await.unwrap();
            let mut other = open(EnvironmentOptions::default());
            let state = "count = 0; state = list(range(1000)); open('/tmp/k', 'w').write('kept')";
            run_cell(&mut other, state).await;
            (session, start, fuel, other)
        });
        Self { runtime, session, start, fuel, other, round: 0 }
    }
}

/// A session as every cell finds it.
async fn begin() -> WasmEnvironment {
    let echo = Tool::new("echo", |call| Ok(call.args.into_iter().next().unwrap_or(Value::None)));
    let mut session = open(EnvironmentOptions {
        limits: Limits {
            fuel: FUEL,
            compute: Duration::from_secs(5),
            wall: Duration::from_secs(10),
            grace: GRACE,
            memory_bytes: MEMORY_BYTES,
            output_bytes: OUTPUT_BYTES,
            lm_calls: LM_CALLS,
            tool_calls: TOOL_CALLS,
            disk_bytes: 256 << 10,
            ..Limits::default()
        },
        policy: Policy { seed: Some(7), clock: Clock::Fixed(1 << 60), ..Policy::default() },
        lm: Some(Arc::new(ScriptedHandler::echo())),
        tools: vec![echo],
        ..EnvironmentOptions::default()
    });
    let cell = run_cell(&mut session, BEFORE).await;
    assert_eq!(cell.outcome, Outcome::Completed);
    session
}

/// Runs a cell of which nothing is known. `None`: it broke the protocol.
async fn execute(session: &mut WasmEnvironment, source: &str) -> Option<Execution> {
    let result = session.execute(source).await;
    assert_eq!(session.status(), Status::Ready, "{result:?}");
    let cell = match result {
        Ok(cell) => cell,
        Err(Error::Protocol { .. }) => return None,
        Err(error) => panic!("a cell led to {error:?}"),
    };
    let usage = &cell.usage;
    assert!(usage.fuel.is_some_and(|fuel| fuel <= FUEL_MAX), "{usage:?}");
    assert!(usage.compute <= COMPUTE_MAX, "{usage:?}");
    assert!(usage.memory_bytes <= MEMORY_BYTES, "{usage:?}");
    assert!(usage.lm_calls <= LM_CALLS && usage.tool_calls <= TOOL_CALLS, "{usage:?}");
    assert!(cell.lm_calls.len() <= LM_CALLS as usize);
    for stream in [&cell.stdout, &cell.stderr] {
        assert!(stream.bytes.len() <= OUTPUT_BYTES as usize + OUTPUT_SLACK);
    }
    Some(cell)
}

/// The session has what it began with; what it cost to see that.
async fn check(session: &mut WasmEnvironment, fuel: Option<u64>) -> Option<u64> {
    let cell = run_cell(session, CHECK).await;
    assert_eq!(cell.stdout.text(), CHECKED, "{}", cell.stderr.text());
    if fuel.is_some() {
        assert_eq!(cell.usage.fuel, fuel, "the same cell in the same state");
    }
    cell.usage.fuel
}

/// Another session does what the first one did.
async fn check_twin(first: Option<&Execution>, source: &str) {
    let mut twin = begin().await;
    let second = execute(&mut twin, source).await;
    let (first, second) = match (first, second.as_ref()) {
        (Some(first), Some(second)) => (first, second),
        (first, second) => return assert_eq!(first.is_some(), second.is_some()),
    };
    // Time is not the same for two.
    let is_timed = |cell: &Execution| {
        !matches!(cell.limit, None | Some(Limit::Fuel)) || cell.usage.compute > TIMELY
    };
    if is_timed(first) || is_timed(second) {
        return;
    }
    assert_eq!((&first.stdout, &first.stderr), (&second.stdout, &second.stderr));
    assert_eq!((first.outcome, &first.value), (second.outcome, &second.value));
    assert_eq!(first.final_answer, second.final_answer);
    assert_eq!(first.usage.fuel, second.usage.fuel);
}
