//! What the commands that run cells share: the store, the image, the session, Ctrl-C.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Execution, Image, Limit, Outcome,
    Runtime, Snapshot, Store, Value, WasmBackend, inspect_snapshot,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Failure;
use super::console::Console;
use super::progress::Display;
use super::units::megabytes;

/// A session as it is meant: everything is read and checked.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) image: String,
    pub(super) wheel: Option<PathBuf>,
    pub(super) options: EnvironmentOptions,
    /// The model of a loop's own calls, where it's another than that of cells.
    pub(super) root_model: Option<String>,
    pub(super) contexts: Vec<Context>,
    pub(super) variables: Vec<(String, Value)>,
    pub(super) snapshot_in: Option<PathBuf>,
    pub(super) snapshot_out: Option<PathBuf>,
}

/// What sessions begin with.
pub(super) struct Base {
    pub(super) runtime: Arc<Runtime>,
    pub(super) image: Image,
    snapshot: Option<Snapshot>,
}

impl Base {
    /// A new session.
    pub(super) fn open(
        &self,
        options: EnvironmentOptions,
    ) -> Result<Box<dyn Environment>, Failure> {
        Ok(Box::new(match &self.snapshot {
            Some(snapshot) => self.runtime.resume(snapshot, options).map_err(refused)?,
            None => self.runtime.environment(&self.image, options)?,
        }))
    }

    /// Where sessions like the new one come from.
    pub(super) fn backend(&self) -> Result<WasmBackend, Failure> {
        let image = match &self.snapshot {
            Some(snapshot) => self.runtime.template(snapshot).map_err(refused)?,
            None => self.image.clone(),
        };
        Ok(WasmBackend::new(Arc::clone(&self.runtime), image))
    }

    /// Makes a session what it was when it was opened.
    pub(super) async fn reset(&self, environment: &mut dyn Environment) -> kaa::Result<()> {
        match &self.snapshot {
            Some(snapshot) => environment.restore(snapshot).await,
            None => environment.reset().await,
        }
    }
}

/// The directory that the user or the system gives.
pub(super) fn store_path() -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os("KAA_CACHE").filter(|path| !path.is_empty()) {
        return std::path::absolute(path).map_err(|e| Failure::usage("KAA_CACHE", e));
    }
    let cache = dirs::cache_dir().ok_or_else(|| {
        Failure::Failed("there is no cache directory: set HOME or KAA_CACHE".into())
    })?;
    Ok(cache.join("kaa"))
}

/// The user's store.
pub(super) fn store() -> Result<Store, Failure> {
    Ok(Store::open(store_path()?)?)
}

/// The engine and what a plan begins with; makes what is missing, and shows it.
pub(super) fn prepare(plan: &Plan, console: Console) -> Result<Base, Failure> {
    let runtime = Arc::new(Runtime::open(store()?)?);
    let display = Display::new(console);
    let header = plan.snapshot_in.as_ref().map(inspect_snapshot).transpose().map_err(refused)?;
    let image = header.as_ref().map_or(&plan.image, |header| &header.image.name);
    let flag = if header.is_some() { "--snapshot-in" } else { "--image" };
    let image = runtime
        .image_from(image, plan.wheel.as_deref(), &|report| display.show(report))
        .map_err(|error| match error {
            kaa::Error::Invalid { .. } => Failure::usage(flag, error),
            other => other.into(),
        })?;
    drop(display);
    let load = |path| runtime.load_snapshot(path, &plan.options.limits).map_err(refused);
    let snapshot = plan.snapshot_in.as_ref().map(load).transpose()?;
    Ok(Base { runtime, image, snapshot })
}

/// What is wrong with the file of `--snapshot-in`.
fn refused(error: kaa::Error) -> Failure {
    match error {
        // The context of the first names the file.
        kaa::Error::Io { .. } | kaa::Error::Incompatible { .. } => {
            Failure::usage("--snapshot-in", error)
        }
        other => other.into(),
    }
}

/// Writes a session to a file, and says so.
pub(super) async fn save(
    environment: &mut dyn Environment,
    path: &Path,
    console: Console,
) -> Result<(), Failure> {
    let bytes = environment.snapshot().await?.save(path)?;
    console.note(&format!("saved the session to {}, {}", path.display(), megabytes(bytes)));
    Ok(())
}

/// The runtime under all sessions of this process: one thread is enough for one session.
pub(super) fn reactor() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Failed(format!("starting the runtime: {e}")))
}

/// Runs a future to its end, without waiting for what it left running in the background.
pub(super) fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let reactor = reactor()?;
    let result = reactor.block_on(future);
    reactor.shutdown_background();
    result
}

/// Gives a new session its contexts and variables.
pub(super) async fn fill(
    environment: &mut dyn Environment,
    contexts: Vec<Context>,
    variables: Vec<(String, Value)>,
) -> Result<(), Failure> {
    for context in contexts {
        let flag = match context {
            Context::Json(_) => "--context-json",
            _ => "--context",
        };
        environment.add_context(context, None).await.map_err(|error| match error {
            // A MemoryError of the guest has no words of its own.
            kaa::Error::Invalid { reason, .. } if reason.trim().is_empty() => {
                Failure::usage(flag, "it does not fit into the session's memory; see --memory")
            }
            kaa::Error::Invalid { reason, .. } => {
                Failure::usage(flag, reason.replace("limits.memory_bytes", "--memory"))
            }
            other => other.into(),
        })?;
    }
    for (name, value) in variables {
        environment.set_variable(&name, value).await.map_err(|error| match error {
            kaa::Error::Invalid { reason, .. } => Failure::usage(&format!("--var {name}"), reason),
            other => other.into(),
        })?;
    }
    Ok(())
}

/// Ctrl-C, from now on: it stops cells instead of this process.
pub(super) fn interrupts() -> Result<Signal, Failure> {
    signal(SignalKind::interrupt())
        .map_err(|e| Failure::Failed(format!("listening for Ctrl-C: {e}")))
}

/// Runs one cell; Ctrl-C stops it.
pub(super) async fn execute(
    environment: &mut dyn Environment,
    code: &str,
    interrupts: &mut Signal,
) -> kaa::Result<Execution> {
    let interrupt = environment.interrupt();
    let mut cell = std::pin::pin!(environment.execute(code));
    loop {
        tokio::select! {
            biased;
            result = &mut cell => return result,
            _ = interrupts.recv() => interrupt.interrupt(),
        }
    }
}

/// What Kaa itself has to say about a cell that is called `name`.
pub(super) fn remarks(name: &str, execution: &Execution) -> Vec<String> {
    let mut remarks = Vec::new();
    let stopped = execution.outcome == Outcome::LimitReached;
    match execution.limit {
        Some(Limit::Interrupt) => remarks.push(format!("{name} was interrupted")),
        Some(limit) if stopped => {
            remarks.push(format!("{name} was stopped by the {limit} limit; --{limit} raises it"));
        }
        Some(limit) => remarks.push(format!("{name} reached the {limit} limit and caught it")),
        None => {}
    }
    if execution.rolled_back {
        remarks.push("the session is as it was before that cell".into());
    }
    for (stream, output) in [("stdout", &execution.stdout), ("stderr", &execution.stderr)] {
        if output.truncated {
            remarks.push(format!(
                "{name}: {stream} is cut, {} of {} bytes are shown; --output keeps more",
                output.bytes.len(),
                output.total_bytes
            ));
        }
    }
    remarks
}
