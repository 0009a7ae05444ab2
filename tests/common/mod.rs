//! What the integration tests share: one runtime per process, over the user's own cache.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kaa::{
    EnvironmentExt, EnvironmentOptions, Execution, Image, Limits, Profile, Progress, Runtime,
    Store, WasmEnvironment,
};

/// Where compiled guests and images are kept: the user's cache, or `KAA_CACHE`.
pub(crate) fn store_root() -> PathBuf {
    match std::env::var_os("KAA_CACHE") {
        Some(root) => root.into(),
        None => dirs::cache_dir().expect("a user has a cache directory").join("kaa"),
    }
}

/// The runtime of this process. The first test on a machine makes the images, which takes minutes.
pub(crate) fn runtime() -> &'static Arc<Runtime> {
    static RUNTIME: OnceLock<Arc<Runtime>> = OnceLock::new();
    RUNTIME.get_or_init(|| Arc::new(Runtime::open(Store::open(store_root()).unwrap()).unwrap()))
}

/// An image that comes with Kaa.
pub(crate) fn image(name: &str) -> Image {
    let progress = |event| {
        if let Progress::End { detail, elapsed } = event {
            eprintln!("{detail} ({elapsed:.1?})");
        }
    };
    runtime().image(name, &progress).unwrap()
}

/// A session of `base`.
pub(crate) fn open(options: EnvironmentOptions) -> WasmEnvironment {
    runtime().environment(&image("base"), options).unwrap()
}

/// A session with defaults.
pub(crate) fn session() -> WasmEnvironment {
    open(EnvironmentOptions::default())
}

/// A session with these limits.
pub(crate) fn limited(limits: Limits) -> WasmEnvironment {
    open(EnvironmentOptions { limits, ..EnvironmentOptions::default() })
}

/// A session of this profile.
pub(crate) fn profiled(profile: Profile) -> WasmEnvironment {
    open(EnvironmentOptions { profile, ..EnvironmentOptions::default() })
}

/// Runs a cell that must not fail on the host's side.
pub(crate) async fn run(session: &mut WasmEnvironment, code: &str) -> Execution {
    match session.execute(code).await {
        Ok(execution) => execution,
        Err(error) => panic!("{code}: {error}"),
    }
}

/// What a cell prints; it must complete.
pub(crate) async fn print(session: &mut WasmEnvironment, code: &str) -> String {
    let execution = run(session, code).await;
    assert_eq!(execution.outcome, kaa::Outcome::Completed, "{code}: {}", execution.stderr.text());
    execution.stdout.text().into_owned()
}
