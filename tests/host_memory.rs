//! What cells, and what is done to sessions from outside, cost the host's memory: nothing for good, and at no
//! moment more than the limits say.
//!
//! The allocator counts every byte, so this process does nothing else, and one test after the other. An action
//! is repeated until all that is made once is there, then repeated again, and what the process holds at rest
//! may not have become more (`host_memory/held.rs`). The actions are in `host_memory/actions.rs`, and leaks
//! on purpose, each of which has to be found. What is held *while* a guest does something large is in
//! `host_memory/peaks.rs`.

#[path = "host_memory/actions.rs"]
mod actions;
mod common;
#[path = "host_memory/held.rs"]
mod held;
#[path = "host_memory/peaks.rs"]
mod peaks;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use kaa::{Environment, EnvironmentExt, WasmEnvironment};
use libtest_mimic::{Arguments, Failed, Trial};
use peak_alloc::PeakAlloc;

use actions::{CELLS, Host, LEAKS, METHODS};
use peaks::PEAKS;

/// Counts what is allocated and not given back.
#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Repetitions before the first look, in which what is made once is made.
const WARM_UP: u64 = 10;
/// Repetitions between the looks: more than before, so that a list that grows with each of them needs more
/// room at least once.
const REPETITIONS: u64 = 20;
/// What is given back in the background is given back within this.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where nothing will be.
const PATIENCE_FOR_LEAKS: Duration = Duration::from_millis(200);

/// So many of the allocator's arenas, which are mapped when threads meet. It's read at the start of a process.
const ARENAS: &str = "MALLOC_ARENA_MAX";

fn main() -> ExitCode {
    if std::env::var_os(ARENAS).is_some() {
        return inside();
    }
    let mut process = Command::new(std::env::current_exe().expect("a program has a path"));
    let status = process.args(std::env::args_os().skip(1)).env(ARENAS, "1").status();
    if status.expect("a process").success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// In a process with few arenas.
fn inside() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // What one test does would be counted as another's.
    arguments.test_threads = Some(1);
    let host = Arc::new(Host::new());
    let mut trials = Vec::new();
    for cell in CELLS {
        let host = Arc::clone(&host);
        trials.push(Trial::test(format!("nothing_stays_of_cells::{}", cell.name), move || {
            let action = async |session: &mut WasmEnvironment| cell.run(session).await;
            flat(&host.block_on(repeat(&host, PATIENCE, action)))
        }));
    }
    for method in METHODS {
        let host = Arc::clone(&host);
        trials.push(Trial::test(format!("nothing_stays_of_calls::{method:?}"), move || {
            let action = async |session: &mut WasmEnvironment| method.call(session, &host).await;
            flat(&host.block_on(repeat(&host, PATIENCE, action)))
        }));
    }
    for peak in PEAKS {
        let host = Arc::clone(&host);
        trials.push(Trial::test(format!("the_peak_is_bounded::{}", peak.name), move || {
            host.block_on(peak.check(&host))
        }));
    }
    // The last, since what they leak stays.
    let is_counted = |figure: &str| figure == "heap bytes" || Path::new("/proc/self").exists();
    for leak in LEAKS.iter().filter(|leak| is_counted(leak.figure)) {
        let host = Arc::clone(&host);
        trials.push(Trial::test(format!("leaks_are_found::{}", leak.name), move || {
            let action = async |session: &mut WasmEnvironment| {
                session.execute("x = 1").await.unwrap();
                (leak.plant)(&host);
            };
            let grown = host.block_on(repeat(&host, PATIENCE_FOR_LEAKS, action));
            let found = grown.iter().any(|words| words.starts_with(leak.figure));
            if found { Ok(()) } else { Err(format!("only this was seen: {grown:?}").into()) }
        }));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What has grown by an action that is repeated in one session.
async fn repeat(
    host: &Host,
    patience: Duration,
    action: impl AsyncFn(&mut WasmEnvironment),
) -> Vec<String> {
    let mut session = common::open(host.options());
    let mut before = None;
    for repetitions in [WARM_UP, REPETITIONS] {
        session.execute(actions::BEGIN).await.unwrap();
        for _ in 0..repetitions {
            action(&mut session).await;
        }
        // Its own pages are its own, and come and go.
        session.reset().await.unwrap();
        match before {
            None => before = Some(held::at_rest().await),
            Some(before) => return held::growth(&before, patience).await,
        }
    }
    unreachable!("there are two rounds")
}

fn flat(grown: &[String]) -> Result<(), Failed> {
    if grown.is_empty() { Ok(()) } else { Err(grown.join("\n").into()) }
}
