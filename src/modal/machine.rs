//! Modal as a machine that starts processes: one sandbox for each session.

use std::time::Duration;

use async_trait::async_trait;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::app::{App, Build};
use super::client::ModalClient;
use super::ending::{Bounds, Ending};
use super::leftovers::EndGuard;
use super::options::{self, Carrier, ModalOptions, Network};
use super::process::SandboxProcess;
use super::proto::client as wire;
use super::relay::{self, Relay};
use super::router::{Command, ProcessExit};
use super::sandbox::{self, Ground, Sandbox};
use super::spec::SandboxSpec;
use super::{BACKEND, CAPABILITIES};
use crate::environment::{Capabilities, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::image::ProgressFn;
use crate::process::{Life, Machine, Started, Surroundings};

/// What a session takes beside the worker's data: the supervisor, two interpreters' code.
const OWN_BYTES: u64 = 128 << 20;
/// What the slowest line carries that a session is kept over.
const SLOW_BYTES_A_SECOND: usize = 1 << 20;
/// How long the cause of an end may take to be known.
const AUTOPSY_TIME: Duration = Duration::from_secs(5);
/// How long a session that is closed waits for the end of its sandbox.
const CLOSE_TIME: Duration = Duration::from_secs(30);
/// What is read of a process's last words.
const WORDS_BYTES_MAX: usize = 8 << 10;
const WORDS_TIME: Duration = Duration::from_millis(500);

/// Modal, with an app and an image.
pub(super) struct ModalMachine {
    client: ModalClient,
    options: ModalOptions,
    app: App,
    image: String,
    secrets: Vec<wire::SecretSource>,
}

impl std::fmt::Debug for ModalMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModalMachine")
            .field("client", &self.client)
            .field("options", &self.options)
            .field("app", &self.app)
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

impl ModalMachine {
    /// Finds the app, builds the image, and ends what dead processes of this host have left.
    pub(super) async fn prepare(
        client: ModalClient,
        options: ModalOptions,
        progress: ProgressFn<'_>,
    ) -> Result<Self> {
        let app = client.app(&options.app).await?;
        let build =
            Build { app: &app, image: &options.image, time: options.build_timeout, progress };
        let built = async { tokio::join!(client.build(&build), client.secrets(&options.secrets)) };
        let (_, (image, secrets)) = tokio::join!(client.end_leftovers(&app.id), built);
        let (image, secrets) = (image?, secrets?);
        Ok(Self { client, options, app, image, secrets })
    }

    fn spec(&self, options: &EnvironmentOptions) -> SandboxSpec {
        let (ports, network) = match (self.options.carrier, &self.options.network) {
            (Carrier::Stdio, network) => (Vec::new(), network.clone()),
            (Carrier::Broker { port }, Network::Blocked) => {
                (vec![port], Network::Allow { cidrs: Vec::new(), domains: Vec::new() })
            }
            (Carrier::Broker { port }, network) => (vec![port], network.clone()),
        };
        let relay = if ports.is_empty() { 0 } else { relay::MEMORY_BYTES };
        let memory = options.limits.memory_bytes.saturating_add(OWN_BYTES + relay);
        SandboxSpec {
            cpu: self.options.cpu,
            memory_mib: memory.div_ceil(1 << 20).try_into().unwrap_or(u32::MAX),
            timeout: self.options.timeout,
            ports,
            network,
            tags: self.options.tags.clone(),
            ..SandboxSpec::default()
        }
    }

    fn command(&self, arguments: &[&str], options: &EnvironmentOptions, scratch: &str) -> Command {
        let own = [
            ("HOME", scratch),
            ("TMPDIR", scratch),
            ("LANG", "C.UTF-8"),
            ("PYTHONDONTWRITEBYTECODE", "1"),
        ];
        let own = own.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let program = std::iter::once(self.options.python.clone());
        Command {
            arguments: program.chain(arguments.iter().map(|&text| text.to_owned())).collect(),
            workdir: Some("/".into()),
            env: own.chain(options.policy.env.iter().cloned()).collect(),
            time: None,
        }
    }
}

#[async_trait]
impl Machine for ModalMachine {
    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn check(&self, options: &EnvironmentOptions) -> Result<()> {
        if !options.policy.mounts.is_empty() {
            return Err(Error::Unsupported { backend: BACKEND, operation: "mounts" });
        }
        for (name, _) in &options.policy.env {
            options::check_variable("policy.env", name)?;
        }
        Ok(())
    }

    async fn start(&self, arguments: &[&str], options: &EnvironmentOptions) -> Result<Started> {
        let session = sandbox::new_session();
        let scratch = format!("/tmp/kaa-{session}");
        let spec = self.spec(options);
        let command = self.command(arguments, options, &scratch);
        let bounds =
            Bounds { timeout: self.options.timeout, memory_bytes: options.limits.memory_bytes };
        let mut surroundings = Surroundings {
            scratch,
            is_alone: false,
            data_bytes: Some(options.limits.memory_bytes),
            file_bytes: Some(options.limits.disk_bytes),
            user: Some(self.options.user),
            door: None,
        };
        let relay = match self.options.carrier {
            Carrier::Stdio => None,
            Carrier::Broker { port } => Some(Relay::new(port, &self.options)),
        };
        surroundings.door = relay.as_ref().map(Relay::door);
        let (client, app, image) = (self.client.clone(), self.app.clone(), self.image.clone());
        let (secrets, patience) = (self.secrets.clone(), self.options.patience);
        let begun = sandbox::undivided(async move {
            let ground = Ground { app: &app, image: &image, secrets, session: &session };
            let (sandbox, guard) = client.create(&spec, ground).await?;
            let mut life = ModalLife::new(sandbox.clone(), guard, bounds, patience);
            let calls = async {
                match relay {
                    Some(relay) => relay.start(&sandbox).await.map(Some),
                    None => Ok(None),
                }
            };
            match tokio::try_join!(life.begin(command, patience), calls) {
                Ok(((), calls)) => Ok((life, calls)),
                Err(error) => {
                    // Why it didn't begin is what has to be known.
                    drop(life.close().await);
                    Err(error)
                }
            }
        });
        let (mut life, calls) = begun.await?;
        let (reader, writer) = life.streams()?;
        Ok(Started { reader, writer, life: Box::new(life), surroundings, calls })
    }
}

/// Power over a session's sandbox.
struct ModalLife {
    sandbox: Sandbox,
    process: Option<SandboxProcess>,
    bounds: Bounds,
    /// How long its connection may be away.
    patience: Duration,
    /// Ends it, unless that has been done or begun.
    guard: Option<EndGuard>,
    /// Its end, if it was begun and nobody waited for it so far.
    end: Option<JoinHandle<Result<()>>>,
    /// How the sandbox ended, once it has.
    ending: watch::Receiver<Option<Ending>>,
    watcher: JoinHandle<()>,
}

impl ModalLife {
    fn new(sandbox: Sandbox, guard: EndGuard, bounds: Bounds, patience: Duration) -> Self {
        let (send, ending) = watch::channel(None);
        let watched = sandbox.clone();
        let watcher = tokio::spawn(async move {
            // After this time it has ended for sure.
            if let Ok(ending) = watched.watch(bounds.timeout).await {
                drop(send.send(Some(ending)));
            }
        });
        let (process, guard, end) = (None, Some(guard), None);
        Self { sandbox, process, bounds, patience, guard, end, ending, watcher }
    }

    async fn begin(&mut self, command: Command, patience: Duration) -> Result<()> {
        let python = command.arguments.first().cloned().unwrap_or_default();
        let started = self.sandbox.start(command, patience).await;
        self.process = Some(started.map_err(|error| match error {
            Error::Unavailable { reason, .. } if reason.contains("executable file not found") => {
                no_python(&format!("no `{python}`: {reason}"))
            }
            error => error,
        })?);
        Ok(())
    }

    /// The streams of the process. Its output ends, too, when the sandbox does.
    fn streams(&mut self) -> Result<(Reader, Writer)> {
        let process = self.process.as_mut();
        let streams =
            process.and_then(|process| Some((process.stdout()?, process.stdin()?, process.lost())));
        let Some((stdout, stdin, lost)) = streams else {
            return Err(Error::Internal("a process in a sandbox without streams".into()));
        };
        let reader = super::until::Until::new(stdout, self.ending.clone(), lost);
        Ok((Box::new(reader), Box::new(stdin)))
    }

    /// What the process said to nobody in particular.
    async fn words(&mut self) -> String {
        let stderr = self.process.as_mut().and_then(|process| process.stderr());
        let Some(mut stderr) = stderr else { return String::new() };
        let mut bytes = vec![0; WORDS_BYTES_MAX];
        let mut length = 0;
        let read = async {
            while length < bytes.len() {
                match stderr.read(&mut bytes[length..]).await {
                    Ok(0) | Err(_) => break,
                    Ok(more) => length += more,
                }
            }
        };
        let _ = tokio::time::timeout(WORDS_TIME, read).await;
        super::fault::said(&String::from_utf8_lossy(&bytes[..length]))
    }
}

fn no_python(found: &str) -> Error {
    Error::Incompatible {
        what: "the image of the Modal sandbox".into(),
        expected: "Python 3.9 or newer (name another image or interpreter)".into(),
        found: found.into(),
    }
}

type Reader = Box<dyn tokio::io::AsyncRead + Send + Sync + Unpin>;
type Writer = Box<dyn tokio::io::AsyncWrite + Send + Sync + Unpin>;

#[async_trait]
impl Life for ModalLife {
    fn kill(&mut self) {
        self.watcher.abort();
        self.process = None;
        if let Some(guard) = self.guard.take() {
            self.end = Some(guard.end());
        }
    }

    async fn close(&mut self) -> Result<()> {
        self.watcher.abort();
        self.process = None;
        let end = match (self.guard.take(), self.end.take()) {
            (Some(guard), _) => guard.end(),
            (None, Some(end)) => end,
            (None, None) => return Ok(()),
        };
        // Without an answer by then it goes on all the same.
        match tokio::time::timeout(CLOSE_TIME, end).await {
            Ok(Ok(ended)) => ended,
            Ok(Err(_)) => self.sandbox.terminate().await,
            Err(_) => {
                let reason = format!(
                    "no answer within {CLOSE_TIME:?}; it's tried for some minutes more, and `kaa modal \
                     list` shows what is left"
                );
                Err(Error::unavailable("the end of the Modal sandbox", reason))
            }
        }
    }

    fn slack(&self, bytes: usize) -> Duration {
        let seconds = bytes / SLOW_BYTES_A_SECOND;
        self.patience + Duration::from_secs(seconds as u64)
    }

    async fn autopsy(&mut self) -> Error {
        let poisoned = |reason: String| Error::Poisoned { reason };
        let until = Instant::now() + AUTOPSY_TIME;
        let known = self.ending.borrow().clone();
        let asked = tokio::time::timeout_at(until, async {
            match known {
                Some(ending) => Ok(Some(ending)),
                None => self.sandbox.ended().await,
            }
        });
        match asked.await {
            Ok(Ok(Some(ending))) => return poisoned(ending.words(Some(self.bounds))),
            Ok(Ok(None)) => {}
            Ok(Err(fault)) => {
                let error = self.sandbox.client().explain(&fault, "the Modal sandbox");
                return poisoned(format!("the connection to the sandbox was lost: {error}"));
            }
            Err(_) => {
                return poisoned(
                    "the connection to the sandbox was lost, and Modal doesn't answer; look at the \
                     network, and end what is left with `kaa modal clean`"
                        .into(),
                );
            }
        }
        let words = self.words().await;
        let words = if words.is_empty() { words } else { format!(": {words}") };
        let process = self.process.as_ref();
        let polled = async {
            match process {
                Some(process) => process.poll().await,
                None => None,
            }
        };
        let Ok(exit) = tokio::time::timeout_at(until, polled).await else {
            return poisoned(format!(
                "the connection to the session's process was lost: its sandbox runs, but the worker \
                 that it's on doesn't answer{words}"
            ));
        };
        match exit {
            Some(ProcessExit::Code(127 | 126)) => {
                no_python(&format!("none that could be started{words}"))
            }
            Some(ProcessExit::Code(code)) => poisoned(format!(
                "the session's process in the sandbox ended with exit code {code}{words}"
            )),
            Some(ProcessExit::Signal(signal)) => poisoned(format!(
                "the session's process in the sandbox was killed by signal {signal}{words}; look \
                 whether limits.memory_bytes, which is {}, is too small for it",
                self.bounds.memory_bytes
            )),
            None => poisoned(self.lost_words(&words)),
        }
    }
}

impl ModalLife {
    /// Why the sandbox can't be reached, though it runs.
    fn lost_words(&self, words: &str) -> String {
        let lost = self.process.as_ref().and_then(|process| process.lost().borrow().clone());
        match lost {
            Some(fault) if !fault.is_transient() => {
                let error = self.sandbox.client().explain(&fault, "the session's process");
                format!(
                    "the connection to the sandbox was lost, though it still runs: {error}{words}"
                )
            }
            _ => {
                let why = lost.map_or_else(String::new, |fault| format!(" ({})", fault.message));
                format!(
                    "the connection to the sandbox was lost for longer than modal.patience, though it \
                     still runs{why}{words}"
                )
            }
        }
    }
}

impl Drop for ModalLife {
    fn drop(&mut self) {
        self.kill();
    }
}
