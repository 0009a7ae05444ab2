//! Sandboxes: their start, what runs in them, and their end.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::Code;
use uuid::Uuid;

use super::app::{App, Build};
use super::client::{Extra, ModalClient};
use super::ending::{self, Ending};
use super::fault::Fault;
use super::image::ModalImage;
use super::options::{self, Network, Secret};
use super::proto::client as wire;
use super::proto::client::network_access::NetworkAccessType;
use super::router::{Command, Descriptor, ProcessExit, Router};
use super::stdin::Stdin;
use super::stdout::Output;
use super::{OWNER_TAG, SESSION_TAG};
use crate::error::{Error, Result};
use crate::image::ProgressFn;
use crate::process::Owner;

/// Bytes between a stream of a process and the connection.
const PIPE_BYTES: usize = 1 << 20;
/// How long making a sandbox may take: there may be no machine for it yet.
const CREATE_TIME: Duration = Duration::from_secs(300);
/// How long tunnels may take to be there.
const TUNNEL_TIME: f32 = 50.0;
/// How long Modal holds the question whether a sandbox has ended, and how long its answer may take.
const WAIT_TIME: f32 = 10.0;
const WAIT_ANSWER_TIME: Duration = Duration::from_secs(15);
/// What Modal takes as arguments of a process, all of them together.
const ARGUMENT_CHARS_MAX: usize = 65_536;
/// Pages of a list of sandboxes that are asked for at most.
const PAGES_MAX: usize = 1_000;

/// A sandbox to make.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxSpec {
    /// The app that it belongs to; it's made if there is none of this name. Default: `kaa`.
    pub app: String,
    /// What is in it. Default: `python:3.11-slim`.
    pub image: ModalImage,
    /// How long building the image may take. Default: 30 min.
    pub build_timeout: Duration,
    /// Processors, in parts of one: what it's promised, and what it has at most. Default: 1.
    pub cpu: f64,
    /// Memory in MiB: what it's promised, and what it has at most. Default: 1,024.
    pub memory_mib: u32,
    /// How long it lives at most, in whole seconds. Default: 1 h.
    pub timeout: Duration,
    /// Its network. Default: none.
    pub network: Network,
    /// Variables that Modal puts into it. Default: none.
    pub secrets: Vec<Secret>,
    /// Its tags. Default: none.
    pub tags: Vec<(String, String)>,
    /// Ports that have a tunnel: an address of Modal's, public and encrypted. Default: none.
    pub ports: Vec<u16>,
    /// Where its processes begin, an absolute path. Default: what the image says.
    pub workdir: Option<String>,
    /// Its first process. Default: one that sleeps.
    pub entrypoint: Vec<String>,
}

impl Default for SandboxSpec {
    fn default() -> Self {
        Self {
            app: "kaa".into(),
            image: ModalImage::default(),
            build_timeout: Duration::from_secs(30 * 60),
            cpu: 1.0,
            memory_mib: 1024,
            timeout: Duration::from_secs(60 * 60),
            network: Network::default(),
            secrets: Vec::new(),
            tags: Vec::new(),
            ports: Vec::new(),
            workdir: None,
            entrypoint: vec!["sleep".into(), "infinity".into()],
        }
    }
}

/// A sandbox that runs, or has run. Dropping it doesn't end it: [`terminate`](Self::terminate) does, or
/// its timeout.
#[derive(Debug, Clone)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: ModalClient,
    id: String,
    token: Option<String>,
    router: Arc<Router>,
    /// Tunnels that were known from the start.
    tunnels: Vec<wire::TunnelData>,
}

/// A process in a sandbox, with its streams. Dropping it lets go of the streams and closes its stdin;
/// the process goes on.
#[derive(Debug)]
pub struct SandboxProcess {
    router: Arc<Router>,
    client: ModalClient,
    exec: String,
    stdin: Option<DuplexStream>,
    stdout: DuplexStream,
    stderr: DuplexStream,
    carriers: Vec<AbortHandle>,
    /// Why one of the streams is lost, once it is.
    lost: watch::Receiver<Option<Fault>>,
    patience: Duration,
}

/// A sandbox that Modal knows.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxReport {
    /// Its id.
    pub id: String,
    /// When it was made.
    pub created_at: SystemTime,
    /// Its tags.
    pub tags: Vec<(String, String)>,
    /// Whether the process that made it lives. Nothing where that isn't known: it was another machine's.
    pub has_owner: Option<bool>,
}

/// What a sandbox is made of that there is.
pub(super) struct Ground<'a> {
    pub(super) app: &'a App,
    pub(super) image: &'a str,
    pub(super) secrets: Vec<wire::SecretSource>,
}

impl ModalClient {
    /// Makes a sandbox, and before that its app and image as far as there are none.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a spec that can't be, [`Error::Unavailable`] when Modal doesn't make it:
    /// the image can't be built, the workspace is over a limit, a secret isn't there.
    pub async fn create_sandbox(
        &self,
        spec: &SandboxSpec,
        progress: ProgressFn<'_>,
    ) -> Result<Sandbox> {
        spec.validate()?;
        let app = self.app(&spec.app).await?;
        let (image, time) = (&spec.image, spec.build_timeout);
        let image = self.build(&Build { app: &app, image, time, progress }).await?;
        let secrets = self.secrets(&spec.secrets).await?;
        self.create(spec, Ground { app: &app, image: &image, secrets }).await
    }

    /// Makes a sandbox on what there is.
    pub(super) async fn create(&self, spec: &SandboxSpec, ground: Ground<'_>) -> Result<Sandbox> {
        let tags = spec.tags.iter().map(|(name, value)| wire::SandboxTag {
            tag_name: name.clone(),
            tag_value: value.clone(),
        });
        let message = wire::SandboxCreateV2Request {
            app_id: ground.app.id.clone(),
            definition: Some(spec.definition(ground.image)),
            tags: tags.collect(),
            secret_sources: ground.secrets,
        };
        let extra = Extra { attempt: Some(CREATE_TIME), ..Extra::default() };
        let made = self.call(message, extra, |mut stub, request| async move {
            stub.sandbox_create_v2(request).await
        });
        let what = "a sandbox of Modal";
        let made = made.await.map_err(|fault| self.explain(&fault, what))?;
        let token = Some(made.sandbox_token).filter(|token| !token.is_empty());
        let access = made.command_router_access.unwrap_or_default();
        let router = Router::new(self, &made.sandbox_id, &made.task_id, &access);
        let router = match router {
            Ok(router) => Arc::new(router),
            Err(fault) => {
                drop(self.terminate(&made.sandbox_id).await);
                return Err(self.explain(&fault, what));
            }
        };
        let (client, id, tunnels) = (self.clone(), made.sandbox_id, made.tunnels);
        Ok(Sandbox { inner: Arc::new(Inner { client, id, token, router, tunnels }) })
    }

    /// A sandbox that was made elsewhere, by its id.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when it isn't there, or has ended.
    pub async fn sandbox(&self, id: &str) -> Result<Sandbox> {
        let what = format!("the Modal sandbox `{id}`");
        let explain = |fault: Fault| self.explain(&fault, &what);
        let message = wire::SandboxGetTaskIdRequest {
            sandbox_id: id.into(),
            ..wire::SandboxGetTaskIdRequest::default()
        };
        let task = self.call(message, Extra::default(), |mut stub, request| async move {
            stub.sandbox_get_task_id_v2(request).await
        });
        let task = task.await.map_err(explain)?;
        if let Some(result) = task.task_result.as_ref().filter(|result| result.status != 0) {
            return Err(Error::unavailable(what, ending::of_result(result).words(None)));
        }
        let target = wire::sandbox_get_command_router_access_request::Target::SandboxId(id.into());
        let message = wire::SandboxGetCommandRouterAccessRequest { target: Some(target) };
        let access = self.call(message, Extra::default(), |mut stub, request| async move {
            stub.sandbox_get_command_router_access(request).await
        });
        let access = access.await.map_err(explain)?;
        let access = wire::CommandRouterAccess { jwt: access.jwt, url: access.url };
        let router = Router::new(self, id, task.task_id(), &access).map_err(explain)?;
        let (client, id, router) = (self.clone(), id.to_owned(), Arc::new(router));
        let inner = Inner { client, id, token: None, router, tunnels: Vec::new() };
        Ok(Sandbox { inner: Arc::new(inner) })
    }

    /// The sandboxes of Kaa's sessions that live, of all apps or of one, the youngest first. An app that
    /// isn't there has none.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for what is no name of an app, [`Error::Unavailable`] when Modal doesn't answer.
    pub async fn sandboxes(&self, app: Option<&str>) -> Result<Vec<SandboxReport>> {
        let app_id = match app {
            Some(name) => self.find_app(name).await?,
            None => Some(String::new()),
        };
        match app_id {
            Some(id) => self.sessions(&id).await,
            None => Ok(Vec::new()),
        }
    }

    pub(super) async fn sessions(&self, app_id: &str) -> Result<Vec<SandboxReport>> {
        let me = Owner::of_this_process();
        let mut found: Vec<SandboxReport> = Vec::new();
        let mut before_timestamp = 0.0;
        for _ in 0..PAGES_MAX {
            let message = wire::SandboxListRequest {
                app_id: app_id.into(),
                before_timestamp,
                environment_name: self.config().environment.clone(),
                include_finished: false,
                tags: Vec::new(),
            };
            let page = self.call(message, Extra::default(), |mut stub, request| async move {
                stub.sandbox_list_v2(request).await
            });
            let page = page.await.map_err(|fault| self.explain(&fault, "a list of sandboxes"))?;
            let Some(last) = page.sandboxes.last() else { break };
            before_timestamp = last.created_at;
            let reports = page.sandboxes.iter().map(|info| report(info, me.as_ref()));
            found.extend(reports.filter(|report| report.tag(SESSION_TAG).is_some()));
        }
        Ok(found)
    }

    /// Ends a sandbox. One that has ended stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when there is none, or Modal doesn't answer.
    pub async fn terminate(&self, id: &str) -> Result<()> {
        let message = wire::SandboxTerminateRequest { sandbox_id: id.into() };
        let ended = self.call(message, Extra::default(), |mut stub, request| async move {
            stub.sandbox_terminate_v2(request).await
        });
        let ended = ended.await.map(drop);
        ended.map_err(|fault| self.explain(&fault, &format!("ending the Modal sandbox `{id}`")))
    }
}

impl SandboxSpec {
    /// Checks what can be checked without Modal.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the field and what would be right.
    pub fn validate(&self) -> Result<()> {
        options::check_app(&self.app)?;
        self.image.validate()?;
        if !self.ports.is_empty() && self.network == Network::Blocked {
            let reason = "Modal has no tunnels to a sandbox whose network is blocked; allow it nothing \
                          instead: Network::Allow with empty lists";
            return Err(Error::invalid("modal.network", reason));
        }
        if self.workdir.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return Err(Error::invalid("modal.workdir", "must be an absolute path"));
        }
        if self.timeout < Duration::from_secs(1) {
            return Err(Error::invalid("modal.timeout", "must be at least a second"));
        }
        Ok(())
    }

    fn definition(&self, image: &str) -> wire::Sandbox {
        let (kind, cidrs, domains) = match &self.network {
            Network::Blocked => (NetworkAccessType::Blocked, Vec::new(), Vec::new()),
            Network::Open => (NetworkAccessType::Open, Vec::new(), Vec::new()),
            Network::Allow { cidrs, domains } => {
                (NetworkAccessType::Allowlist, cidrs.clone(), domains.clone())
            }
        };
        let ports = self
            .ports
            .iter()
            .map(|port| wire::PortSpec { port: (*port).into(), unencrypted: false });
        let ports = wire::PortSpecs { ports: ports.collect() };
        let milli_cpu = (self.cpu * 1000.0).round() as u32;
        wire::Sandbox {
            entrypoint_args: self.entrypoint.clone(),
            image_id: image.into(),
            resources: Some(wire::Resources {
                memory_mb: self.memory_mib,
                milli_cpu,
                memory_mb_max: self.memory_mib,
                milli_cpu_max: milli_cpu,
            }),
            timeout_secs: self.timeout.as_secs().try_into().unwrap_or(u32::MAX),
            workdir: self.workdir.clone(),
            open_ports_oneof: Some(wire::sandbox::OpenPortsOneof::OpenPorts(ports)),
            network_access: Some(wire::NetworkAccess {
                network_access_type: kind.into(),
                allowed_cidrs: cidrs,
                allowed_domains: domains,
            }),
            name: None,
            idle_timeout_secs: None,
        }
    }
}

impl SandboxReport {
    fn tag(&self, name: &str) -> Option<&str> {
        self.tags.iter().find(|(tag, _)| tag == name).map(|(_, value)| value.as_str())
    }
}

fn report(info: &wire::SandboxInfo, me: Option<&Owner>) -> SandboxReport {
    let seconds = if info.created_at.is_finite() { info.created_at.clamp(0.0, 1e11) } else { 0.0 };
    let tags = info.tags.iter().map(|tag| (tag.tag_name.clone(), tag.tag_value.clone()));
    let mut report = SandboxReport {
        id: info.id.clone(),
        created_at: UNIX_EPOCH + Duration::from_secs_f64(seconds),
        tags: tags.collect(),
        has_owner: None,
    };
    report.has_owner = report.tag(OWNER_TAG).and_then(|tag| me?.knows_alive(tag));
    report
}

impl Sandbox {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    pub(super) fn client(&self) -> &ModalClient {
        &self.inner.client
    }

    fn explain(&self, fault: &Fault, what: &str) -> Error {
        self.inner.client.explain(fault, what)
    }

    fn extra(&self) -> Extra<'_> {
        Extra { sandbox_token: self.inner.token.as_deref(), attempt: None }
    }

    /// Starts a process, whose first argument is its program, with these variables beside the
    /// sandbox's. Connections that break are mended for two minutes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for arguments of more than 65,536 characters in all (give it the rest on
    /// stdin), [`Error::Unavailable`] when the sandbox has ended or doesn't answer.
    pub async fn exec(
        &self,
        arguments: &[&str],
        env: &[(String, String)],
    ) -> Result<SandboxProcess> {
        let command = Command {
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            env: env.to_vec(),
            ..Command::default()
        };
        self.start(command, Duration::from_secs(120)).await
    }

    pub(super) async fn start(
        &self,
        command: Command,
        patience: Duration,
    ) -> Result<SandboxProcess> {
        let chars =
            command.arguments.iter().map(|argument| argument.chars().count()).sum::<usize>();
        if chars > ARGUMENT_CHARS_MAX {
            let reason =
                format!("{chars} characters, and Modal takes {ARGUMENT_CHARS_MAX}; use stdin");
            return Err(Error::invalid("the arguments of a process", reason));
        }
        let exec = Uuid::new_v4().to_string();
        let router = &self.inner.router;
        if let Err(fault) = router.start(&exec, &command).await {
            // The sandbox's own end says more than that there is nothing to start a process in.
            return Err(match self.ended().await {
                Ok(Some(ending)) => Error::unavailable("the Modal sandbox", ending.words(None)),
                _ => self.explain(&fault, "a process in the Modal sandbox"),
            });
        }
        let (lose, lost) = watch::channel(None);
        let mut process = SandboxProcess {
            lost,
            patience,
            router: Arc::clone(router),
            client: self.inner.client.clone(),
            exec: exec.clone(),
            stdin: None,
            stdout: tokio::io::duplex(1).0,
            stderr: tokio::io::duplex(1).0,
            carriers: Vec::new(),
        };
        let (near, far) = tokio::io::duplex(PIPE_BYTES);
        let stdin = Stdin::new(Arc::clone(router), exec.clone(), far, patience);
        // It ends by itself, with the end of what it carries: a process whose stdin is dropped is told.
        tokio::spawn(carried(stdin.run(), lose.clone()));
        process.stdin = Some(near);
        for descriptor in [Descriptor::Stdout, Descriptor::Stderr] {
            let (near, sink) = tokio::io::duplex(PIPE_BYTES);
            let (router, exec) = (Arc::clone(router), exec.clone());
            let output = Output { router, exec, descriptor, sink, patience };
            let carrier = tokio::spawn(carried(output.run(), lose.clone()));
            process.carriers.push(carrier.abort_handle());
            match descriptor {
                Descriptor::Stdout => process.stdout = near,
                Descriptor::Stderr => process.stderr = near,
            }
        }
        Ok(process)
    }

    /// The address of the tunnel to a port, such as `https://….modal.host`. It's public.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a port that has none, [`Error::Unavailable`] when Modal doesn't tell.
    pub async fn tunnel(&self, port: u16) -> Result<String> {
        let is_it = |tunnel: &&wire::TunnelData| tunnel.container_port == u32::from(port);
        let url = |tunnel: &wire::TunnelData| match tunnel.port {
            443 => format!("https://{}", tunnel.host),
            port => format!("https://{}:{port}", tunnel.host),
        };
        if let Some(tunnel) = self.inner.tunnels.iter().find(is_it) {
            return Ok(url(tunnel));
        }
        let message =
            wire::SandboxGetTunnelsRequest { sandbox_id: self.id().into(), timeout: TUNNEL_TIME };
        let answer =
            self.inner.client.call(message, self.extra(), |mut stub, request| async move {
                stub.sandbox_get_tunnels_v2(request).await
            });
        let what = format!("the tunnel to port {port} of the Modal sandbox");
        let answer = answer.await.map_err(|fault| self.explain(&fault, &what))?;
        if let Some(tunnel) = answer.tunnels.iter().find(is_it) {
            return Ok(url(tunnel));
        }
        match answer.result.map(|result| ending::of_result(&result)) {
            Some(ending) if !ending.is_success() => {
                Err(Error::unavailable(what, "it wasn't there in time; try again"))
            }
            _ => Err(Error::invalid(what, "the sandbox was made without this port")),
        }
    }

    /// How it ended, if it has.
    pub(super) async fn ended(&self) -> Result<Option<Ending>, Fault> {
        self.wait_for(0.0, None).await
    }

    async fn wait_for(
        &self,
        timeout: f32,
        attempt: Option<Duration>,
    ) -> Result<Option<Ending>, Fault> {
        let message = wire::SandboxWaitRequest { sandbox_id: self.id().into(), timeout };
        let extra = Extra { attempt, ..self.extra() };
        let waited = self.inner.client.call(message, extra, |mut stub, request| async move {
            stub.sandbox_wait_v2(request).await
        });
        let result = waited.await?.result.filter(|result| result.status != 0);
        Ok(result.map(|result| ending::of_result(&result)))
    }

    /// Waits until it has ended: how.
    pub(super) async fn watch(&self) -> Result<Ending, Fault> {
        loop {
            match self.wait_for(WAIT_TIME, Some(WAIT_ANSWER_TIME)).await {
                Ok(Some(ending)) => return Ok(ending),
                Ok(None) => {}
                Err(fault) if fault.code == Code::DeadlineExceeded => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    /// Waits until it has ended, and says how.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when Modal doesn't answer.
    pub async fn wait(&self) -> Result<String> {
        let ended = self.watch().await.map(|ending| ending.words(None));
        ended.map_err(|fault| self.explain(&fault, "the end of the Modal sandbox"))
    }

    /// Ends it. One that has ended stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when Modal doesn't answer.
    pub async fn terminate(&self) -> Result<()> {
        self.inner.client.terminate(self.id()).await
    }

    /// Makes an image of its files, for [`ModalImage::from_id`]: its id. Modal keeps it for so long, or
    /// for as long as it keeps anything.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when the sandbox has ended or Modal doesn't answer.
    pub async fn snapshot_filesystem(&self, keep: Option<Duration>) -> Result<String> {
        let id = Uuid::new_v4().to_string();
        let made = self.inner.router.snapshot(&id, keep).await;
        made.map_err(|fault| self.explain(&fault, "a snapshot of the Modal sandbox's files"))
    }
}

impl SandboxProcess {
    /// Its stdin, once. Dropping that closes it.
    pub fn stdin(&mut self) -> Option<impl AsyncWrite + Send + Sync + Unpin + 'static> {
        self.stdin.take()
    }

    /// What it writes to stdout.
    pub fn stdout(&mut self) -> &mut (impl AsyncRead + Send + Sync + Unpin + 'static) {
        &mut self.stdout
    }

    /// What it writes to stderr.
    pub fn stderr(&mut self) -> &mut (impl AsyncRead + Send + Sync + Unpin + 'static) {
        &mut self.stderr
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when the sandbox has ended before, or Modal doesn't answer.
    pub async fn wait(&self) -> Result<ProcessExit> {
        let waited = self.router.wait(&self.exec, self.patience).await;
        waited.map_err(|fault| self.client.explain(&fault, "a process in the Modal sandbox"))
    }

    /// How it ended, if it has.
    pub(super) async fn poll(&self) -> Option<ProcessExit> {
        self.router.poll(&self.exec).await.ok().flatten()
    }

    /// Its stdin, which stays open.
    pub(super) fn stdin_mut(&mut self) -> Option<&mut DuplexStream> {
        self.stdin.as_mut()
    }

    /// Why one of its streams is lost, once it is.
    pub(super) fn lost(&self) -> watch::Receiver<Option<Fault>> {
        self.lost.clone()
    }

    /// Takes the streams that a session is carried by.
    pub(super) fn take_streams(&mut self) -> (DuplexStream, Option<DuplexStream>) {
        (std::mem::replace(&mut self.stdout, tokio::io::duplex(1).0), self.stdin.take())
    }
}

/// Notes why a stream is lost, if it is.
async fn carried(run: impl Future<Output = Result<(), Fault>>, lose: watch::Sender<Option<Fault>>) {
    if let Err(fault) = run.await {
        lose.send_replace(Some(fault));
    }
}

impl Drop for SandboxProcess {
    fn drop(&mut self) {
        self.carriers.iter().for_each(AbortHandle::abort);
    }
}
