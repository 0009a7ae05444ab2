//! What isolation costs: the same workloads on every backend, in turns, in one run.
//!
//! A [`Subject`] is timed at [`Workload`]s. [`Sessions`] is the subject for every
//! [`Backend`](crate::Backend), so that others measure theirs beside Kaa's; [`InProcess`] is the floor,
//! CPython's own `exec`. A [`Suite`] runs them, and gives a [`Report`], which is JSON, a table of
//! Markdown, or a plot. `kaa bench isolation` is this with Kaa's backends.
//!
//! ```no_run
//! use std::sync::Arc;
//! use kaa::benchmark::{InProcess, Sessions, Suite, Workload};
//! use kaa::{Runtime, Store, WasmBackend};
//!
//! # #[tokio::main]
//! # async fn main() -> kaa::Result<()> {
//! let runtime = Arc::new(Runtime::open(Store::open("/var/lib/my-app/kaa")?)?);
//! let image = runtime.image("base", &|_| {})?;
//! let wasm = Arc::new(WasmBackend::new(runtime, image));
//! let suite = Suite::default()
//!     .subject(InProcess::new("python3"))
//!     .subject(Sessions::new("wasm", "WebAssembly", wasm))
//!     .workloads([Workload::Session, Workload::Cell])
//!     .laps(3);
//! let report = suite.run(&|_| {}).await;
//! println!("{}", report.markdown());
//! # Ok(())
//! # }
//! ```

mod figure;
mod in_process;
mod machine;
mod plot;
mod report;
mod script;
mod sessions;
mod subject;
mod suite;
mod table;
mod workload;

pub use self::figure::Figure;
pub use self::in_process::InProcess;
pub use self::machine::Machine;
pub use self::report::{Cell, Report, Role, SubjectReport};
pub use self::sessions::{Sessions, pause};
pub use self::subject::{Facts, Missed, Subject};
pub use self::suite::{Event, Suite};
pub use self::workload::{Block, CpuPart, Unit, Workload};
