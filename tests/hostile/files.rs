//! Snapshot files that mean harm: how they are made, and what is done with them.

#[path = "../common/parts.rs"]
mod parts;

use std::path::Path;
use std::time::Duration;

pub(crate) use self::parts::{PAGE, Parts};
use super::common::{self, open, print, run, runtime};
use kaa::{
    Clock, Environment, EnvironmentExt, EnvironmentOptions, Error, Limits, MEMORY_BYTES_MAX,
    Policy, Snapshot, Value, WasmEnvironment,
};

/// Far above what the limits of a hostile session allow it.
const TOO_LONG: Duration = Duration::from_secs(60);

pub(crate) fn options() -> EnvironmentOptions {
    EnvironmentOptions {
        limits: Limits {
            fuel: 30_000_000,
            compute: Duration::from_secs(2),
            wall: Duration::from_secs(5),
            grace: Duration::from_millis(20),
            memory_bytes: 128 << 20,
            disk_bytes: 1 << 20,
            ..Limits::default()
        },
        ..EnvironmentOptions::default()
    }
}

/// A session with some of everything, as a file.
pub(crate) async fn victim(directory: &Path) -> Parts {
    let policy = Policy { seed: Some(3), clock: Clock::Fixed(1), ..Policy::default() };
    let mut session = open(EnvironmentOptions { policy, ..options() });
    run(&mut session, "import random\nx = 1\nl = [n * n for n in range(20_000)]\ng = iter(l)")
        .await;
    let file = directory.join("good");
    session.snapshot().await.unwrap().save(&file).unwrap();
    Parts::read(&file)
}

/// What a harmed session answers, whatever that is: a fault of Kaa's own it isn't.
fn sound<T>(result: kaa::Result<T>) -> kaa::Result<T> {
    assert!(!matches!(result, Err(Error::Internal(_))), "{:?}", result.err());
    result
}

/// Everything that one does with a session. What comes of it doesn't matter.
async fn use_up(session: &mut WasmEnvironment) {
    let _ = sound(session.execute("x = sum(l); print(x, random.random())").await);
    let _ = sound(
        session
            .execute("import time, os; y = bytearray(9_000_000); print(time.time(), os.urandom(3))")
            .await,
    );
    let _ = sound(session.set_variable("z", Value::from("text")).await);
    let _ = sound(session.get_variable("l").await);
    let _ = sound(session.list_variables().await);
    if let Ok(mut fork) = sound(session.fork_session().await) {
        let _ = sound(fork.execute("open('/tmp/f', 'w').write('x' * 5000)").await);
        let _ = sound(fork.hibernate().await);
        let _ = sound(fork.execute("print(next(g), os.listdir('/tmp'))").await);
    }
    let _ = sound(session.reset().await);
}

/// Loads a file, goes on from it in every way, and says whether that was possible at all.
pub(crate) async fn suffer(
    what: &str,
    file: &Path,
    options: EnvironmentOptions,
) -> Result<(), String> {
    let all = async {
        // As much as there can be: the limits of the sessions below have to hold by themselves.
        let limits = Limits { memory_bytes: MEMORY_BYTES_MAX, ..Limits::default() };
        let snapshot: Snapshot =
            sound(runtime().load_snapshot(file, &limits)).map_err(|e| e.to_string())?;
        let resumed = sound(runtime().resume(&snapshot, options.clone()));
        let mut live = open(options);
        live.execute("mine = 1; open('/tmp/mine', 'w').write('1')").await.unwrap();
        let restored = sound(live.restore(&snapshot).await);
        use_up(&mut live).await;
        if !matches!(live.execute("1 + 1").await, Ok(cell) if cell.value.as_deref() == Some("2")) {
            panic!("{what}: a session that was begun anew doesn't work");
        }
        let mut session = resumed.map_err(|e| e.to_string())?;
        use_up(&mut session).await;
        restored.map_err(|e| e.to_string())
    };
    tokio::time::timeout(TOO_LONG, all).await.unwrap_or_else(|_| panic!("{what} takes too long"))
}

/// What others see of all this: a session that was there before, and a new one.
pub(crate) async fn check_others(what: &str, bystander: &mut WasmEnvironment, round: &mut u64) {
    *round += 1;
    let text =
        print(bystander, "count += 1; print(count, len(state), state[77], open('/tmp/k').read())")
            .await;
    assert_eq!(text, format!("{round} 1000 77 kept\n"), "{what}");
    let mut fresh = common::session();
    let text = print(
        &mut fresh,
        "import os; print(os.listdir('/tmp'), 'x' in globals(), sum(range(1000)))",
    )
    .await;
    assert_eq!(text, "[] False 499500\n", "{what}");
}

pub(crate) async fn bystander() -> WasmEnvironment {
    let mut session = common::session();
    run(&mut session, "count = 0; state = list(range(1000)); open('/tmp/k', 'w').write('kept')")
        .await;
    session
}
