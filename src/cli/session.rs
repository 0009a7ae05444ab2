//! What the commands that run cells share: the store, the backend, the session, Ctrl-C.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use kaa::{
    Backend, Capabilities, Context, Environment, EnvironmentExt, EnvironmentOptions, Execution,
    Image, Limit, Limits, LocalBackend, LocalOptions, Outcome, Runtime, Snapshot, Status, Store,
    Value, WasmBackend, inspect_snapshot,
};

use super::backend::Place;
use super::console::Console;
use super::progress::Display;
use super::units::megabytes;
use super::{Failure, in_flags};

/// `PROTO` in CPython's Lib/pickle.py.
const PICKLE: u8 = 0x80;
const NOT_ISOLATED: &str = "local sessions are not isolated: their code can do whatever you can, \
                            with your files, your processes and your network";
const DILL_HELP: &str = "install it there, as by `python3 -m pip install dill`, or name a Python that \
                         has it with --python, or an image with --docker-image; in a sandbox of \
                         Modal, --modal-pip dill";

/// A session as it is meant: everything is read and checked.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) place: Place,
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
    source: Source,
    snapshot: Option<Snapshot>,
}

/// Where sessions come from.
enum Source {
    Wasm { runtime: Arc<Runtime>, image: Image },
    Processes(Processes),
}

/// Reads a snapshot file.
pub(super) type Loader = dyn Fn(&Path) -> kaa::Result<Snapshot>;

/// A backend whose sessions are processes.
pub(super) struct Processes {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) load: Box<Loader>,
    /// What a session is, for who sits in front of it.
    pub(super) what: String,
}

impl Base {
    /// A new session, which can do what the plan wants of it.
    async fn open(&self, plan: &Plan) -> Result<Box<dyn Environment>, Failure> {
        let options = plan.options.clone();
        let mut environment: Box<dyn Environment> = match (&self.source, &self.snapshot) {
            (Source::Wasm { runtime, .. }, Some(snapshot)) => {
                Box::new(runtime.resume(snapshot, options).map_err(refused)?)
            }
            (Source::Wasm { runtime, image }, None) => {
                Box::new(runtime.environment(image, options)?)
            }
            (Source::Processes(processes), _) => processes.backend.open(options).await?,
        };
        let ready = match (&self.source, &self.snapshot) {
            (Source::Processes(_), Some(snapshot)) => {
                environment.restore(snapshot).await.map_err(refused)
            }
            _ => Ok(()),
        };
        let saves = plan.snapshot_out.is_some();
        let ready = ready.and_then(|()| if saves { check_saving(&*environment) } else { Ok(()) });
        match ready {
            Ok(()) => Ok(environment),
            Err(failure) => {
                // What went wrong first is what has to be known.
                let _ = environment.close().await;
                Err(failure)
            }
        }
    }

    /// A new session with the plan's contexts and variables.
    pub(super) async fn begin(&self, plan: &Plan) -> Result<Box<dyn Environment>, Failure> {
        let mut environment = self.open(plan).await?;
        let (contexts, variables) = (plan.contexts.clone(), plan.variables.clone());
        match fill(&mut *environment, contexts, variables).await {
            Ok(()) => Ok(environment),
            Err(failure) => {
                let _ = environment.close().await;
                Err(failure)
            }
        }
    }

    /// Where sessions like the new one come from.
    pub(super) fn backend(&self) -> Result<Arc<dyn Backend>, Failure> {
        Ok(match (&self.source, &self.snapshot) {
            (Source::Wasm { runtime, image }, snapshot) => {
                let image = match snapshot {
                    Some(snapshot) => runtime.template(snapshot).map_err(refused)?,
                    None => image.clone(),
                };
                Arc::new(WasmBackend::new(Arc::clone(runtime), image))
            }
            (Source::Processes(processes), Some(snapshot)) => {
                let backend = Arc::clone(&processes.backend);
                Arc::new(Resumed { backend, snapshot: snapshot.clone() })
            }
            (Source::Processes(processes), None) => Arc::clone(&processes.backend),
        })
    }

    /// Makes a session what it was when it was opened.
    pub(super) async fn reset(&self, environment: &mut dyn Environment) -> kaa::Result<()> {
        let is_whole = matches!(self.source, Source::Wasm { .. });
        if !is_whole || self.snapshot.is_none() {
            // In a process also what variables don't show: its threads, its modules.
            environment.reset().await?;
        }
        match &self.snapshot {
            Some(snapshot) => environment.restore(snapshot).await,
            None => Ok(()),
        }
    }

    /// Reads a snapshot file of this backend.
    pub(super) fn load(&self, path: &Path, limits: &Limits) -> kaa::Result<Snapshot> {
        match &self.source {
            Source::Wasm { runtime, .. } => runtime.load_snapshot(path, limits),
            Source::Processes(processes) => (processes.load)(path),
        }
    }

    /// What a session is, for who sits in front of it.
    pub(super) fn what(&self) -> String {
        match &self.source {
            Source::Wasm { image, .. } => {
                let manifest = image.manifest();
                format!("Python {} in WebAssembly, image `{}`", manifest.python, manifest.name)
            }
            Source::Processes(processes) => processes.what.clone(),
        }
    }
}

/// Sessions of a backend that begin with a snapshot.
struct Resumed {
    backend: Arc<dyn Backend>,
    snapshot: Snapshot,
}

#[async_trait]
impl Backend for Resumed {
    fn capabilities(&self) -> Capabilities {
        self.backend.capabilities()
    }

    async fn open(&self, options: EnvironmentOptions) -> kaa::Result<Box<dyn Environment>> {
        let mut environment = self.backend.open(options).await?;
        match environment.restore(&self.snapshot).await {
            Ok(()) => Ok(environment),
            Err(error) => {
                let _ = environment.close().await;
                Err(error)
            }
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

/// The backend and what a plan begins with; makes what is missing, and shows it.
pub(super) fn prepare(
    plan: &Plan,
    console: Console,
    reactor: &tokio::runtime::Runtime,
) -> Result<Base, Failure> {
    let display = Display::new(console);
    let source = match &plan.place {
        Place::Wasm { image, wheel } => {
            let runtime = Arc::new(Runtime::open(store()?)?);
            let image = wasm_image(&runtime, image, wheel.as_deref(), plan, &display)?;
            Source::Wasm { runtime, image }
        }
        Place::Local(options) => {
            // Who runs such code has to know it, whatever else is of no interest.
            console.complain(NOT_ISOLATED);
            Source::Processes(local(options))
        }
        Place::Docker(docker) => {
            Source::Processes(reactor.block_on(docker.connect(&|report| display.show(report)))?)
        }
        Place::Modal(modal) => {
            Source::Processes(reactor.block_on(modal.connect(&|report| display.show(report)))?)
        }
    };
    drop(display);
    let mut base = Base { source, snapshot: None };
    let load = |path: &PathBuf| base.load(path, &plan.options.limits).map_err(refused);
    base.snapshot = plan.snapshot_in.as_ref().map(load).transpose()?;
    Ok(base)
}

fn wasm_image(
    runtime: &Runtime,
    name: &str,
    wheel: Option<&Path>,
    plan: &Plan,
    display: &Display,
) -> Result<Image, Failure> {
    if plan.snapshot_in.as_deref().is_some_and(is_pickle) {
        let reason = "it is of a session that isn't wasm's; add --backend local, docker or modal";
        return Err(Failure::usage("--snapshot-in", reason));
    }
    let header = plan.snapshot_in.as_ref().map(inspect_snapshot).transpose().map_err(refused)?;
    let name = header.as_ref().map_or(name, |header| &header.image.name);
    let flag = if header.is_some() { "--snapshot-in" } else { "--image" };
    runtime.image_from(name, wheel, &|report| display.show(report)).map_err(|error| match error {
        kaa::Error::Invalid { .. } => Failure::usage(flag, error),
        other => other.into(),
    })
}

fn local(options: &LocalOptions) -> Processes {
    let what = format!("`{}` in a process of yours, not isolated", options.python.display());
    let backend = LocalBackend::new(options.clone());
    let loader = backend.clone();
    let load = Box::new(move |path: &Path| loader.load_snapshot(path));
    Processes { backend: Arc::new(backend), load, what }
}

/// What is wrong with the file of `--snapshot-in`.
fn refused(error: kaa::Error) -> Failure {
    match error {
        // The context of the first names the file.
        kaa::Error::Io { .. } | kaa::Error::Incompatible { .. } => {
            Failure::usage("--snapshot-in", error)
        }
        kaa::Error::Unsupported { .. } => Failure::usage("--snapshot-in", without_dill(&error)),
        other => other.into(),
    }
}

/// Whether a file begins as the snapshots of processes do, which are pickles.
pub(super) fn is_pickle(path: &Path) -> bool {
    let mut first = [0];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut first));
    read.is_ok() && first == [PICKLE]
}

fn without_dill(error: &kaa::Error) -> String {
    format!("{error}; {DILL_HELP}")
}

/// Whether a session can be saved when it ends: later would be too late to say so.
pub(super) fn check_saving(environment: &dyn Environment) -> Result<(), Failure> {
    let capabilities = environment.capabilities();
    if capabilities.snapshot {
        return Ok(());
    }
    let backend = capabilities.backend;
    let error = kaa::Error::Unsupported { backend, operation: "snapshot: its Python has no dill" };
    Err(Failure::usage("--snapshot-out", without_dill(&error)))
}

/// Writes a session to a file, and says so. What is not in it is named.
pub(super) async fn save(
    environment: &mut dyn Environment,
    path: &Path,
    console: Console,
) -> Result<(), Failure> {
    let snapshot = match environment.snapshot().await {
        Err(error @ kaa::Error::Unsupported { .. }) => {
            return Err(Failure::Failed(without_dill(&error)));
        }
        Err(kaa::Error::Poisoned { reason }) => {
            let file = path.display();
            return Err(Failure::Failed(format!(
                "{file} is not written: no state is left ({reason})"
            )));
        }
        snapshot => snapshot?,
    };
    let bytes = snapshot.save(path)?;
    console.note(&format!("saved the session to {}, {}", path.display(), megabytes(bytes)));
    if let Some(names) = unsaved(&snapshot) {
        console.complain(&format!("{} is without what has no saved form: {names}", path.display()));
    }
    Ok(())
}

/// The names of the variables that a snapshot does without, if there are any.
pub(super) fn unsaved(snapshot: &Snapshot) -> Option<String> {
    (!snapshot.unsaved().is_empty()).then(|| snapshot.unsaved().join(", "))
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
            kaa::Error::Invalid { reason, .. } => Failure::usage(flag, in_flags(&reason)),
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

/// Runs one cell; whatever `stop` waits for stops it, every time.
pub(super) async fn execute(
    environment: &mut dyn Environment,
    code: &str,
    mut stop: impl AsyncFnMut(),
) -> kaa::Result<Execution> {
    let interrupt = environment.interrupt();
    let mut cell = std::pin::pin!(environment.execute(code));
    loop {
        tokio::select! {
            biased;
            result = &mut cell => return result,
            () = stop() => interrupt.interrupt(),
        }
    }
}

/// Why a cell that is called `name` cost the session its state.
pub(super) fn loss(name: &str, execution: &Execution) -> String {
    let reason = execution.exception.as_ref().map(|exception| exception.message.trim());
    match reason {
        Some(reason) => format!("{name} cost the session its state: {}", in_flags(reason)),
        None => format!("{name} cost the session its state"),
    }
}

/// Whether a session has lost its state.
pub(super) fn is_lost(environment: &dyn Environment) -> bool {
    environment.status() == Status::Poisoned
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
