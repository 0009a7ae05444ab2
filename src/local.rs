//! Sessions in processes of this host, without isolation.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, Command};

use crate::environment::{Backend, Capabilities, Environment, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::process::{Life, Machine, ProcessBackend, Started, Surroundings};
use crate::snapshot::Snapshot;

/// The backend's name.
const BACKEND: &str = "local";
/// Where programs are looked for, unless the options say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a supervisor may take to end, before it's killed.
const END_TIME: Duration = Duration::from_secs(5);
/// How often is looked whether it has ended.
const REAP_TICK: Duration = Duration::from_millis(5);
/// Bytes that are kept of what a process says when it fails.
const WORDS_BYTES_MAX: u64 = 8 << 10;
const WORDS_TIME: Duration = Duration::from_millis(200);

/// How processes of this host are started.
///
/// ```
/// let options = kaa::LocalOptions {
///     python: "/opt/venv/bin/python3".into(),
///     ..kaa::LocalOptions::default()
/// };
/// # assert_eq!(options.setup_code, None);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalOptions {
    /// The interpreter: CPython 3.9 or newer. A name without `/` is looked for in `path`. Default:
    /// `python3`.
    pub python: PathBuf,
    /// `PATH` of the process. Default: the system's folders. Of the host's environment a session has
    /// nothing but what [`Policy::env`](crate::Policy::env) grants.
    pub path: String,
    /// Python that every session runs before anything else. Default: none.
    pub setup_code: Option<String>,
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self { python: "python3".into(), path: PATH.into(), setup_code: None }
    }
}

/// Sessions in processes of this host. **Nothing isolates them**: their code can do whatever the user
/// can. They are there to compare with, and for code that is trusted.
///
/// Needs a tokio runtime with time and I/O enabled. Memory ([`Limits::memory_bytes`](crate::Limits))
/// is bounded as data of the process, files one by one ([`disk_bytes`](crate::Limits::disk_bytes));
/// mounts, a seed, a fixed clock and a limit of fuel are refused as unsupported.
///
/// ```no_run
/// use kaa::{Backend, EnvironmentExt, EnvironmentOptions, LocalBackend, LocalOptions};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> kaa::Result<()> {
/// let backend = LocalBackend::new(LocalOptions::default());
/// let mut session = backend.open(EnvironmentOptions::default()).await?;
/// assert_eq!(session.execute("1 + 1").await?.value.as_deref(), Some("2"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LocalBackend(ProcessBackend);

impl LocalBackend {
    /// What sessions in processes of this host can do. Snapshots there are where the Python has dill.
    pub const CAPABILITIES: Capabilities = Capabilities {
        backend: BACKEND,
        isolated: false,
        fuel: false,
        rollback: false,
        snapshot: false,
        deterministic: false,
    };

    /// Sessions whose processes are started like this.
    #[must_use]
    pub fn new(options: LocalOptions) -> Self {
        let LocalOptions { python, path, setup_code } = options;
        Self(ProcessBackend::new(LocalMachine { python, path }, setup_code))
    }

    /// Reads a snapshot that a session in a process has saved. Blocks. Loading it into a session runs
    /// what it says, with all that the session may do.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be read, [`Error::Incompatible`] when it isn't one,
    /// [`Error::Invalid`] when it's too long.
    pub fn load_snapshot(&self, path: impl AsRef<Path>) -> Result<Snapshot> {
        self.0.load_snapshot(path.as_ref())
    }
}

#[async_trait]
impl Backend for LocalBackend {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        self.0.open(options).await
    }
}

#[derive(Debug)]
struct LocalMachine {
    python: PathBuf,
    path: String,
}

#[async_trait]
impl Machine for LocalMachine {
    fn capabilities(&self) -> Capabilities {
        LocalBackend::CAPABILITIES
    }

    fn check(&self, options: &EnvironmentOptions) -> Result<()> {
        if !options.policy.mounts.is_empty() {
            return Err(Error::Unsupported { backend: BACKEND, operation: "mounts" });
        }
        Ok(())
    }

    async fn start(&self, arguments: &[&str], options: &EnvironmentOptions) -> Result<Started> {
        let scratch = tempfile::Builder::new().prefix("kaa-").tempdir();
        let scratch = scratch.map_err(|e| Error::io("making a directory for a session", e))?;
        let mut command = Command::new(&self.python);
        command.args(arguments).current_dir(scratch.path());
        command.env_clear().env("PATH", &self.path).env("LANG", "C.UTF-8");
        command.env("HOME", scratch.path()).env("TMPDIR", scratch.path());
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command.envs(options.policy.env.iter().map(|(name, value)| (name, value)));
        // Ctrl-C in the terminal is the host's affair.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| self.unstarted(&e))?;
        let (Some(writer), Some(reader)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Internal("a process without the pipes that it was given".into()));
        };
        let words = child.stderr.take();
        let surroundings = Surroundings {
            scratch: scratch.path().to_string_lossy().into_owned(),
            is_alone: false,
            data_bytes: Some(options.limits.memory_bytes),
            file_bytes: Some(options.limits.disk_bytes),
            user: None,
            door: None,
        };
        Ok(Started {
            reader: Box::new(reader),
            writer: Box::new(writer),
            life: Box::new(LocalLife { child: Some((child, scratch)), words }),
            surroundings,
            calls: None,
        })
    }
}

impl LocalMachine {
    fn unstarted(&self, error: &std::io::Error) -> Error {
        let reason = format!(
            "starting it failed: {error}; install Python 3.9 or newer, or name another interpreter"
        );
        Error::unavailable(format!("`{}`", self.python.display()), reason)
    }
}

/// A supervisor on this host, and the directory of its session.
struct LocalLife {
    child: Option<(Child, TempDir)>,
    words: Option<ChildStderr>,
}

impl LocalLife {
    /// What the process said to nobody in particular.
    async fn words(&mut self) -> String {
        let Some(words) = self.words.take() else { return String::new() };
        let mut bytes = Vec::new();
        // Whatever it has started may keep the pipe open.
        let mut words = words.take(WORDS_BYTES_MAX);
        let _ = tokio::time::timeout(WORDS_TIME, words.read_to_end(&mut bytes)).await;
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

/// Waits for a supervisor that knows that it has to end.
async fn end(child: &mut Child) -> std::io::Result<ExitStatus> {
    match tokio::time::timeout(END_TIME, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.kill().await?;
            child.wait().await
        }
    }
}

/// As [`end`], where nothing may be awaited.
fn reap(mut child: Child, scratch: TempDir) {
    let since = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if since.elapsed() > END_TIME {
            // Dropping it does the rest.
            let _ = child.start_kill();
            break;
        }
        std::thread::sleep(REAP_TICK);
    }
    drop(scratch);
}

#[async_trait]
impl Life for LocalLife {
    fn kill(&mut self) {
        let Some((child, scratch)) = self.child.take() else { return };
        // A thread and no task: the runtime may be gone, or end with the next statement, and the
        // supervisor needs a moment to end what it has started. If the host ends meanwhile, it does
        // all of that by itself. Without a thread it's killed here.
        let reaper = std::thread::Builder::new().name("kaa-reaper".into());
        let _ = reaper.spawn(move || reap(child, scratch));
    }

    async fn close(&mut self) -> Result<()> {
        let Some((mut child, scratch)) = self.child.take() else { return Ok(()) };
        end(&mut child).await.map_err(|e| Error::io("ending the session's process", e))?;
        let path = scratch.path().to_owned();
        match scratch.close() {
            // The supervisor was first.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            closed => closed.map_err(|e| Error::io(format!("removing {}", path.display()), e)),
        }
    }

    async fn autopsy(&mut self) -> Error {
        let status = match &mut self.child {
            Some((child, _)) => tokio::time::timeout(END_TIME, child.wait()).await.ok(),
            None => None,
        };
        let end = match status {
            Some(Ok(status)) => format!("it ended with {status}"),
            _ => "it closed the channel and lives on".to_owned(),
        };
        let words = self.words().await;
        let words = if words.is_empty() { words } else { format!(": {words}") };
        let reason = format!("{end}{words}; reset the session to start another");
        Error::unavailable("the session's process", reason)
    }
}

impl Drop for LocalLife {
    fn drop(&mut self) {
        self.kill();
    }
}
