//! Sandboxes: their start, what runs in them, and their end.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::app::{App, Build};
use super::client::{ASK_PAUSE, Extra, ModalClient};
use super::ending::{self, Ending};
use super::fault::Fault;
use super::leftovers::{self, EndGuard};
use super::outage::{may_pass, outlast};
use super::process::SandboxProcess;
use super::proto::client as wire;
use super::router::{Command, Router};
use super::spec::SandboxSpec;
use super::{OWNER_TAG, SESSION_TAG};
use crate::error::{Error, Result};
use crate::image::ProgressFn;

/// How long making a sandbox may take: there may be no machine for it yet.
const CREATE_TIME: Duration = Duration::from_secs(300);
/// How long tunnels may take to be there.
const TUNNEL_TIME: f32 = 50.0;
/// How long Modal holds the question whether a sandbox has ended, and how long its answer may take.
const WAIT_TIME: f32 = 10.0;
const WAIT_ANSWER_TIME: Duration = Duration::from_secs(15);
/// How long an outage may last while somebody waits for a sandbox's end.
const WAIT_PATIENCE: Duration = Duration::from_secs(10 * 60);
/// What Modal takes as arguments of a process, all of them together.
const ARGUMENT_CHARS_MAX: usize = 65_536;

/// A sandbox that runs, or has run. Dropping it doesn't end it: [`terminate`](Self::terminate) does, or
/// its timeout. Once the process that made it is dead, it's a leftover, which `kaa modal clean` ends, and
/// so does the next [`ModalBackend`](super::ModalBackend) of that machine that connects to the same app.
#[derive(Debug, Clone)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

struct Inner {
    client: ModalClient,
    id: String,
    token: Option<String>,
    router: Arc<Router>,
    /// Tunnels that were known from the start.
    tunnels: Vec<wire::TunnelData>,
}

/// What a sandbox is made of that there is.
pub(super) struct Ground<'a> {
    pub(super) app: &'a App,
    pub(super) image: &'a str,
    pub(super) secrets: Vec<wire::SecretSource>,
    /// What it's found by.
    pub(super) session: &'a str,
}

/// A name that no other sandbox is found by.
pub(super) fn new_session() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// Begins what must not be dropped half-way. What nobody waits for any more is dropped as a whole.
///
/// # Errors
///
/// Those of the work, and that the runtime shut down.
pub(super) fn undivided<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    let done = tokio::spawn(work);
    async {
        done.await.unwrap_or_else(|_| {
            let reason = "the runtime that was to start it shut down";
            Err(Error::unavailable("a sandbox of Modal", reason))
        })
    }
}

impl ModalClient {
    /// Makes a sandbox, and before that its app and image as far as there are none. One that nobody waits
    /// for any more is ended.
    ///
    /// Beside its own tags it gets `kaa-session`, by which it's told from others, and `kaa-owner`, the
    /// process that it belongs to: [`sandboxes`](Self::sandboxes) finds it by them.
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
        let (client, spec, session) = (self.clone(), spec.clone(), new_session());
        let (sandbox, guard) = undivided(async move {
            let ground = Ground { app: &app, image: &image, secrets, session: &session };
            client.create(&spec, ground).await
        })
        .await?;
        guard.release();
        Ok(sandbox)
    }

    /// Makes a sandbox on what there is. It's ended with the guard.
    pub(super) async fn create(
        &self,
        spec: &SandboxSpec,
        ground: Ground<'_>,
    ) -> Result<(Sandbox, EndGuard)> {
        let tag = |name: &str, value: &str| wire::SandboxTag {
            tag_name: name.to_owned(),
            tag_value: value.to_owned(),
        };
        let own = [tag(SESSION_TAG, ground.session), tag(OWNER_TAG, &leftovers::owner_tag())];
        let tags = spec.tags.iter().map(|(name, value)| tag(name, value)).chain(own);
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
        let made = made.await.map_err(|fault| {
            if may_pass(&fault) {
                let (app, session) = (ground.app.id.clone(), ground.session.to_owned());
                tokio::spawn(self.clone().end_unanswered(app, session));
            }
            self.explain(&fault, what)
        })?;
        let token = Some(made.sandbox_token).filter(|token| !token.is_empty());
        let guard = EndGuard::new(self, &made.sandbox_id, token.as_deref());
        let own = (made.sandbox_id.as_str(), token.as_deref());
        let access = match made.command_router_access {
            Some(access) if !access.url.is_empty() => access,
            _ => self.access(own.0, own.1).await.map_err(|fault| self.explain(&fault, what))?,
        };
        let router = Router::new(self, own, &made.task_id, &access);
        let router = Arc::new(router.map_err(|fault| self.explain(&fault, what))?);
        let (client, id, tunnels) = (self.clone(), made.sandbox_id, made.tunnels);
        let inner = Inner { client, id, token, router, tunnels };
        Ok((Sandbox { inner: Arc::new(inner) }, guard))
    }

    /// Where the worker of a sandbox is, and a pass for it.
    ///
    /// # Errors
    ///
    /// As every call.
    pub(super) async fn access(
        &self,
        id: &str,
        sandbox_token: Option<&str>,
    ) -> Result<wire::CommandRouterAccess, Fault> {
        let target = wire::sandbox_get_command_router_access_request::Target::SandboxId(id.into());
        let message = wire::SandboxGetCommandRouterAccessRequest { target: Some(target) };
        let extra = Extra { sandbox_token, ..Extra::default() };
        let access = self.call(message, extra, |mut stub, request| async move {
            stub.sandbox_get_command_router_access(request).await
        });
        let access = access.await?;
        Ok(wire::CommandRouterAccess { jwt: access.jwt, url: access.url })
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
        let access = self.access(id, None).await.map_err(explain)?;
        let router = Router::new(self, (id, None), task.task_id(), &access).map_err(explain)?;
        let (client, id, router) = (self.clone(), id.to_owned(), Arc::new(router));
        let inner = Inner { client, id, token: None, router, tunnels: Vec::new() };
        Ok(Sandbox { inner: Arc::new(inner) })
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("client", &self.client)
            .field("id", &self.id)
            .field("tunnels", &self.tunnels)
            .finish_non_exhaustive()
    }
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
        Ok(SandboxProcess::new(&self.inner.client, router, &exec, patience))
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

    /// Waits until it has ended: how. Outages that are no longer than `patience` are waited for, too.
    pub(super) async fn watch(&self, patience: Duration) -> Result<Ending, Fault> {
        loop {
            let asked = Instant::now();
            let question = || self.wait_for(WAIT_TIME, Some(WAIT_ANSWER_TIME));
            if let Some(ending) = outlast(patience, question).await? {
                return Ok(ending);
            }
            tokio::time::sleep(ASK_PAUSE.saturating_sub(asked.elapsed())).await;
        }
    }

    /// Waits until it has ended, and says how.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when Modal doesn't answer for ten minutes.
    pub async fn wait(&self) -> Result<String> {
        let ended = self.watch(WAIT_PATIENCE).await.map(|ending| ending.words(None));
        ended.map_err(|fault| self.explain(&fault, "the end of the Modal sandbox"))
    }

    /// Ends it. One that has ended stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when Modal doesn't answer.
    pub async fn terminate(&self) -> Result<()> {
        self.inner.client.end(self.id(), self.inner.token.as_deref()).await
    }

    /// Makes an image of its files, for [`ModalImage::from_id`](super::ModalImage::from_id): its id. Modal keeps it for so long, or
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
