//! The sandboxes that there are: whose they are, and the end of those that nobody owns any more.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::client::{Extra, ModalClient};
use super::proto::client as wire;
use super::{OWNER_TAG, SESSION_TAG};
use crate::error::Result;
use crate::process::Owner;

/// Pages of a list of sandboxes that are asked for at most.
const PAGES_MAX: usize = 1_000;

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

impl ModalClient {
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
