//! The sandboxes that there are: whose they are, and the end of those that nobody owns any more.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::client::{Extra, ModalClient};
use super::fault::Fault;
use super::outage::{may_pass, outlast};
use super::proto::client as wire;
use super::{OWNER_TAG, SESSION_TAG};
use crate::error::Result;
use crate::process::Owner;

/// Pages of a list of sandboxes that are asked for at most.
const PAGES_MAX: usize = 1_000;
/// How long it's tried to end a sandbox that nobody waits for, whatever becomes of the network.
const END_TIME: Duration = Duration::from_secs(10 * 60);
/// The pauses between looks for a sandbox that may come into being yet.
const LOOK_PAUSE: Duration = Duration::from_secs(1);
const LOOK_PAUSE_MAX: Duration = Duration::from_secs(60);

/// A sandbox that Modal knows.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxReport {
    /// Its id.
    pub id: String,
    /// When it was made.
    pub created_at: SystemTime,
    /// Its tags.
    pub tags: Vec<(String, String)>,
    /// Whether the process that made it lives. Nothing where that isn't known: it was another machine's, or
    /// it's another user's, and this machine hides those.
    pub has_owner: Option<bool>,
}

impl ModalClient {
    /// The sandboxes that live and that Kaa has made, for sessions or by
    /// [`create_sandbox`](Self::create_sandbox), of all apps or of one, the youngest first. An app that
    /// isn't there has none.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for what is no name of an app,
    /// [`Error::Unavailable`](crate::Error::Unavailable) when Modal doesn't answer.
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
        let found = self.tagged(app_id, &[]).await;
        found.map_err(|fault| self.explain(&fault, "a list of sandboxes"))
    }

    /// Those of Kaa's that have these tags.
    async fn tagged(
        &self,
        app_id: &str,
        tags: &[wire::SandboxTag],
    ) -> Result<Vec<SandboxReport>, Fault> {
        let me = Owner::of_this_process();
        let mut found: Vec<SandboxReport> = Vec::new();
        let mut before_timestamp = 0.0;
        for _ in 0..PAGES_MAX {
            let message = wire::SandboxListRequest {
                app_id: app_id.into(),
                before_timestamp,
                environment_name: self.config().environment.clone(),
                include_finished: false,
                tags: tags.to_vec(),
            };
            let page = self.call(message, Extra::default(), |mut stub, request| async move {
                stub.sandbox_list_v2(request).await
            });
            let page = page.await?;
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
    /// [`Error::Unavailable`](crate::Error::Unavailable) when there is none, or Modal doesn't answer.
    pub async fn terminate(&self, id: &str) -> Result<()> {
        self.end(id, None).await
    }

    /// The same, with what Modal gave with the sandbox.
    ///
    /// # Errors
    ///
    /// As [`terminate`](Self::terminate).
    pub(super) async fn end(&self, id: &str, sandbox_token: Option<&str>) -> Result<()> {
        let ended = self.try_to_end(id, sandbox_token).await;
        ended.map_err(|fault| self.explain(&fault, &format!("ending the Modal sandbox `{id}`")))
    }

    async fn try_to_end(&self, id: &str, sandbox_token: Option<&str>) -> Result<(), Fault> {
        let message = wire::SandboxTerminateRequest { sandbox_id: id.into() };
        let extra = Extra { sandbox_token, ..Extra::default() };
        let ended = self.call(message, extra, |mut stub, request| async move {
            stub.sandbox_terminate_v2(request).await
        });
        ended.await.map(drop)
    }

    /// Ends the sandbox of a session whose making was asked for without ever an answer: it may be there
    /// all the same, now or in a moment.
    pub(super) async fn end_unanswered(self, app_id: String, session: String) {
        let (since, mut pause) = (Instant::now(), LOOK_PAUSE);
        let tag = wire::SandboxTag { tag_name: SESSION_TAG.into(), tag_value: session.clone() };
        let tags = [tag];
        loop {
            let found = match self.tagged(&app_id, &tags).await {
                Ok(found) => found,
                Err(fault) if may_pass(&fault) => Vec::new(),
                Err(_) => return,
            };
            let mut own = found.into_iter();
            let own = own.find(|sandbox| sandbox.tag(SESSION_TAG) == Some(session.as_str()));
            if let Some(SandboxReport { id, .. }) = own {
                drop(outlast(END_TIME, || self.try_to_end(&id, None)).await);
                return;
            }
            if since.elapsed() + pause > END_TIME {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_PAUSE_MAX);
        }
    }

    /// Ends what dead processes of this machine have left in an app. Best effort: whatever this doesn't
    /// end, `kaa modal clean` or the timeout does.
    pub(super) async fn end_leftovers(&self, app_id: &str) {
        let Ok(found) = self.sessions(app_id).await else { return };
        for sandbox in found.iter().filter(|sandbox| sandbox.has_owner == Some(false)) {
            drop(self.terminate(&sandbox.id).await);
        }
    }
}

impl SandboxReport {
    fn tag(&self, name: &str) -> Option<&str> {
        self.tags.iter().find(|(tag, _)| tag == name).map(|(_, value)| value.as_str())
    }
}

/// Ends a sandbox when it's dropped, unless that was released. Nobody waits for it, so it takes its time:
/// the network that a session was lost to is the one that its end has to be said over.
pub(super) struct EndGuard {
    client: ModalClient,
    /// Its id, and what Modal gave with it.
    sandbox: Option<(String, Option<String>)>,
    /// Where that is done when the guard is dropped elsewhere.
    runtime: Handle,
}

impl EndGuard {
    pub(super) fn new(client: &ModalClient, id: &str, token: Option<&str>) -> Self {
        let sandbox = Some((id.to_owned(), token.map(str::to_owned)));
        Self { client: client.clone(), sandbox, runtime: Handle::current() }
    }

    /// Somebody has it now.
    pub(super) fn release(mut self) {
        self.sandbox = None;
    }

    /// Ends it now, in a task that goes on whether it's waited for or not.
    ///
    /// With the runtime at its end the task is never run: then its timeout ends the sandbox, or the next
    /// process that connects.
    pub(super) fn end(mut self) -> JoinHandle<Result<()>> {
        let sandbox = self.sandbox.take();
        self.spawn(sandbox)
    }

    fn spawn(&self, sandbox: Option<(String, Option<String>)>) -> JoinHandle<Result<()>> {
        let client = self.client.clone();
        self.runtime.spawn(async move {
            let Some((id, token)) = sandbox else { return Ok(()) };
            let ended = outlast(END_TIME, || client.try_to_end(&id, token.as_deref())).await;
            ended.map_err(|fault| {
                client.explain(&fault, &format!("ending the Modal sandbox `{id}`"))
            })
        })
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if let Some(sandbox) = self.sandbox.take() {
            drop(self.spawn(Some(sandbox)));
        }
    }
}

/// Whose sandboxes are that this process makes.
pub(super) fn owner_tag() -> String {
    Owner::of_this_process().map_or_else(|| "unknown".into(), |me| me.tag())
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
