//! Kaa runs Python that nobody has read yet: cells that a model wrote, in a persistent session of full
//! CPython inside WebAssembly.
//!
//! A session lives in four steps:
//!
//! 1. a [`Store`] is the directory of compiled code and images, a [`Runtime`] the engine over it;
//! 2. an [`Image`] is what sessions start from: Python started, modules imported;
//! 3. a [`WasmEnvironment`] is one session; it implements the contract, [`Environment`];
//! 4. [`execute`](EnvironmentExt::execute) runs a cell and gives an [`Execution`].
//!
//! A [`Snapshot`] is a session's state: to go back to, to fork, to keep in a file, or to be the
//! [template](Runtime::template) of many sessions. A [`Pool`] keeps memory for those of many sessions
//! that are used, and a [`Tenant`] is whose sessions they are.
//!
//! ```no_run
//! use kaa::{EnvironmentExt, EnvironmentOptions, Limits, Outcome, Runtime, Store};
//! use std::time::Duration;
//!
//! # async fn example() -> kaa::Result<()> {
//! let runtime = Runtime::open(Store::open("/var/lib/my-app/kaa")?)?;
//! let image = runtime.image("base", &|_| {})?;
//! let limits = Limits { compute: Duration::from_secs(1), ..Limits::default() };
//! let options = EnvironmentOptions { limits, ..EnvironmentOptions::default() };
//! let mut session = runtime.environment(&image, options)?;
//! session.execute("x = 41").await?;
//! let stopped = session.execute("while True: pass").await?;
//! assert_eq!(stopped.outcome, Outcome::LimitReached);
//! let next = session.execute("print(x + 1)").await?; // the session is as it was
//! assert_eq!(next.stdout.text(), "42\n");
//! # Ok(())
//! # }
//! ```
//!
//! The same contract is kept by sessions in processes, which any code that takes a [`Backend`] can use:
//! [`docker::DockerBackend`] has them in containers, [`LocalBackend`] on this host, where nothing
//! isolates them; [`modal::ModalBackend`] has them in a cloud. For sandboxes of other clouds there is the
//! [`broker`] alone, which carries their model calls to the host. The suite that holds all of them to it is the module `conformance`, a feature.
//!
//! What Kaa does not do: in WebAssembly it gives the guest no threads, sockets or subprocesses, it
//! doesn't protect against side channels, and it reads no environment variable and prints nothing;
//! that is the command line's part. How it works inside: [`_architecture`].

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
compile_error!(
    "Kaa runs on Linux and macOS: it maps images with mmap and keeps them private by owner and mode"
);

mod agent;
#[cfg(feature = "benchmark")]
pub mod benchmark;
pub mod broker;
mod capture;
#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "docker")]
pub mod docker;
mod environment;
mod error;
mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod limits;
pub mod lm;
mod local;
#[cfg(feature = "modal")]
pub mod modal;
mod policy;
mod process;
mod protocol;
mod rlm;
mod snapshot;
mod tenant;
mod value;
pub mod wasm;

#[doc = include_str!("architecture.md")]
pub mod _architecture {}

/// The examples of the README, compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use environment::*;
pub use error::{Error, Result};
pub use image::{ImageManifest, Progress, ProgressFn, Store};
pub use limits::*;
pub use local::{LocalBackend, LocalOptions};
pub use policy::{Clock, Mount, Policy};
pub use rlm::{
    Compaction, Dialect, Ending, Rlm, RlmCompletion, RlmError, RlmEvent, RlmObserver, RlmOptions,
    RlmProgress, RlmSession, RlmStop, RlmTool,
};
pub use snapshot::{
    ClockRecord, SessionRecord, Snapshot, SnapshotData, SnapshotHeader, SnapshotImage, Told,
    inspect_snapshot,
};
pub use tenant::{Quotas, Refusals, Tenant, TenantUsage};
pub use value::Value;
pub use wasm::{
    Image, ImageSpec, Metering, Pool, PoolPolicy, PoolStatus, PooledEnvironment, Runtime,
    WasmBackend, WasmEnvironment,
};
