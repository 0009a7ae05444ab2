//! Apps, their images and secrets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use tonic::{Code, Status};

use super::client::{ASK_PAUSE, Extra, ModalClient};
use super::fault::{Fault, said};
use super::image::{Base, ModalImage};
use super::options::{self, Secret};
use super::proto::client as wire;
use super::proto::client::generic_result::GenericStatus;
use crate::error::{Error, Result};
use crate::image::{Progress, ProgressFn};

/// How long Modal holds a request for the log of a build before it says that there is nothing new.
const LOG_TIME: f32 = 55.0;
/// How often in a row the log may break off.
const LOG_FAILURES_MAX: u32 = 3;
/// The pause before it's asked for again after that.
const LOG_PAUSE: Duration = Duration::from_millis(100);
/// How long the rest of the log is listened to after the result.
const REST_TIME: Duration = Duration::from_secs(5);
/// What is kept of a log for the error: its end.
const LOG_LINES_KEPT: usize = 20;
const LOG_LINE_CHARS_MAX: usize = 400;
/// The builder whose layers these are, where the environment names none.
const BUILDER: &str = "2025.06";

/// An app that there is.
#[derive(Debug, Clone)]
pub(super) struct App {
    pub(super) id: String,
    builder: String,
}

/// A build: which image, how long, who hears of it.
pub(super) struct Build<'a> {
    pub(super) app: &'a App,
    pub(super) image: &'a ModalImage,
    pub(super) time: Duration,
    pub(super) progress: ProgressFn<'a>,
}

impl ModalClient {
    /// Finds an app, or makes it.
    ///
    /// # Errors
    ///
    /// As every call.
    pub(super) async fn app(&self, name: &str) -> Result<App> {
        let environment = &self.config().environment;
        let message = wire::AppGetOrCreateRequest {
            app_name: name.into(),
            environment_name: environment.clone(),
            object_creation_type: wire::ObjectCreationType::CreateIfMissing.into(),
        };
        let app = self.call(message, Extra::default(), |mut stub, request| async move {
            stub.app_get_or_create(request).await
        });
        let settings = wire::EnvironmentGetOrCreateRequest {
            deployment_name: environment.clone(),
            object_creation_type: wire::ObjectCreationType::Unspecified.into(),
        };
        let settings = self.call(settings, Extra::default(), |mut stub, request| async move {
            stub.environment_get_or_create(request).await
        });
        let (app, settings) = tokio::join!(app, settings);
        let app = app.map_err(|fault| self.explain(&fault, &format!("the Modal app `{name}`")))?;
        let settings = settings.map_err(|fault| {
            let what = match environment.as_str() {
                "" => "the default environment of Modal".to_owned(),
                name => format!("the Modal environment `{name}`"),
            };
            self.explain(&fault, &what)
        })?;
        let theirs = settings.metadata.and_then(|metadata| metadata.settings);
        let theirs = theirs.map(|settings| settings.image_builder_version);
        let builder = self.config().image_builder_version.clone().or(theirs);
        let builder = builder.filter(|version| !version.is_empty());
        Ok(App { id: app.app_id, builder: builder.unwrap_or_else(|| BUILDER.into()) })
    }

    /// The id of an app, if there is one of this name.
    ///
    /// # Errors
    ///
    /// As every call.
    pub(super) async fn find_app(&self, name: &str) -> Result<Option<String>> {
        options::check_app(name)?;
        let message = wire::AppGetOrCreateRequest {
            app_name: name.into(),
            environment_name: self.config().environment.clone(),
            object_creation_type: wire::ObjectCreationType::Unspecified.into(),
        };
        let app = self.call(message, Extra::default(), |mut stub, request| async move {
            stub.app_get_or_create(request).await
        });
        match app.await {
            Ok(app) => Ok(Some(app.app_id)),
            Err(fault) if fault.code == Code::NotFound => Ok(None),
            Err(fault) => Err(self.explain(&fault, &format!("the Modal app `{name}`"))),
        }
    }

    /// The id of an image, which is built if Modal doesn't have it.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] with the end of the log when the build fails.
    pub(super) async fn build(&self, build: &Build<'_>) -> Result<String> {
        let started = Instant::now();
        let (mut id, first) = match &build.image.base {
            Base::Registry(name) => (String::new(), Some(vec![format!("FROM {name}")])),
            Base::Id(id) => (id.clone(), None),
        };
        let layers = first.into_iter().chain(build.image.layers.iter().cloned());
        for (at, commands) in layers.enumerate() {
            let is_first = at == 0 && id.is_empty();
            let (base_images, commands) = match is_first {
                true => (Vec::new(), commands),
                false => {
                    let base = wire::BaseImage { image_id: id, docker_tag: "base".into() };
                    let from = std::iter::once("FROM base".to_owned());
                    (vec![base], from.chain(commands).collect())
                }
            };
            let image = wire::Image { base_images, dockerfile_commands: commands };
            id = self.layer(build, image, started).await?;
        }
        Ok(id)
    }

    async fn layer(
        &self,
        build: &Build<'_>,
        image: wire::Image,
        started: Instant,
    ) -> Result<String> {
        let what = format!(
            "the layer `{}` of the Modal image",
            said(&image.dockerfile_commands.last().cloned().unwrap_or_default())
        );
        let message = wire::ImageGetOrCreateRequest {
            image: Some(image),
            app_id: build.app.id.clone(),
            force_build: false,
            builder_version: build.app.builder.clone(),
        };
        let answer = self.call(message, Extra::default(), |mut stub, request| async move {
            stub.image_get_or_create(request).await
        });
        let answer = answer.await.map_err(|fault| self.explain(&fault, &what))?;
        let id = answer.image_id;
        if let Some(result) = answer.result.filter(is_done) {
            return match result.status() {
                GenericStatus::Success => Ok(id),
                _ => Err(failed(&what, &result, &Log::default())),
            };
        }
        (build.progress)(Progress::Begin { step: "build", bytes: None });
        let left = build.time.saturating_sub(started.elapsed());
        let mut heard = Heard::default();
        let followed =
            tokio::time::timeout(left, self.follow(&id, build.progress, &mut heard)).await;
        let Heard { mut log, result, .. } = heard;
        log.end(build.progress);
        let result = match (result, followed) {
            (Some(result), _) => result,
            (None, Ok(Err(fault))) => return Err(log.with(self.explain(&fault, &what))),
            (None, _) => {
                let reason = format!(
                    "its build took longer than modal.build_timeout, {:?}; raise that",
                    build.time
                );
                return Err(log.with(Error::unavailable(what, reason)));
            }
        };
        if result.status() != GenericStatus::Success {
            return Err(failed(&what, &result, &log));
        }
        (build.progress)(Progress::End { detail: id.clone(), elapsed: started.elapsed() });
        Ok(id)
    }

    /// Follows the log of a build until there is a result.
    async fn follow(
        &self,
        id: &str,
        progress: ProgressFn<'_>,
        heard: &mut Heard,
    ) -> Result<(), Fault> {
        loop {
            let message = wire::ImageJoinStreamingRequest {
                image_id: id.into(),
                timeout: LOG_TIME,
                last_entry_id: heard.last_entry.clone(),
                include_logs_for_finished: true,
            };
            let asked = Instant::now();
            let token = self.token().await?;
            let request = self.request(message, &token);
            let listened = match self.stub().image_join_streaming(request).await {
                Err(status) => Err(Fault::from(status)),
                Ok(answer) => heard.listen(answer.into_inner(), progress).await,
            };
            if heard.result.is_some() {
                return Ok(());
            }
            match listened {
                // The server may not have held the question.
                Ok(()) => tokio::time::sleep(ASK_PAUSE.saturating_sub(asked.elapsed())).await,
                Err(fault) if fault.code == Code::Unauthenticated && !heard.is_refused => {
                    heard.is_refused = true;
                    self.other_token(&token).await?;
                }
                Err(fault) => {
                    heard.failures += 1;
                    if !fault.is_transient() || heard.failures > LOG_FAILURES_MAX {
                        return Err(fault);
                    }
                    tokio::time::sleep(LOG_PAUSE).await;
                }
            }
        }
    }

    /// Secrets as a sandbox gets them: those of the account by their ids, variables as they are.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] for a secret that the account doesn't have.
    pub(super) async fn secrets(&self, secrets: &[Secret]) -> Result<Vec<wire::SecretSource>> {
        let mut sources = Vec::new();
        let mut variables = wire::StringMap::default();
        for secret in secrets {
            match secret {
                Secret::Variable { name, value } => {
                    variables.contents.insert(name.clone(), value.clone());
                }
                Secret::Named(name) => {
                    let message = wire::SecretGetOrCreateRequest {
                        deployment_name: name.clone(),
                        environment_name: self.config().environment.clone(),
                        ..wire::SecretGetOrCreateRequest::default()
                    };
                    let found =
                        self.call(message, Extra::default(), |mut stub, request| async move {
                            stub.secret_get_or_create(request).await
                        });
                    let found = found.await.map_err(|fault| {
                        self.explain(&fault, &format!("the Modal secret `{name}`"))
                    })?;
                    let id = wire::secret_source::Source::SecretId(found.secret_id);
                    sources.push(wire::SecretSource { source: Some(id) });
                }
            }
        }
        if !variables.contents.is_empty() {
            let env = wire::secret_source::Source::Env(variables);
            sources.push(wire::SecretSource { source: Some(env) });
        }
        Ok(sources)
    }
}

fn is_done(result: &wire::GenericResult) -> bool {
    result.status != GenericStatus::Unspecified as i32
}

/// Why a build failed, with what it said last.
fn failed(what: &str, result: &wire::GenericResult, log: &Log) -> Error {
    let reason = match result.status() {
        GenericStatus::Timeout => "its build took longer than Modal allows",
        GenericStatus::Terminated => "its build was ended from outside",
        GenericStatus::MemoryManagerEviction | GenericStatus::MemoryThrashingEviction => {
            "its build was out of memory"
        }
        GenericStatus::InternalFailure | GenericStatus::InitFailure => {
            "its build failed inside of Modal; try again"
        }
        _ => "its build failed",
    };
    let exception = said(&result.exception);
    let exception = if exception.is_empty() { exception } else { format!(": {exception}") };
    log.with(Error::unavailable(what, format!("{reason}{exception}")))
}

/// What is known of a build.
#[derive(Default)]
struct Heard {
    log: Log,
    last_entry: String,
    /// How often in a row the log broke off.
    failures: u32,
    /// Whether the token was refused since something was heard.
    is_refused: bool,
    result: Option<wire::GenericResult>,
}

impl Heard {
    /// Listens to one stream of the log, up to its end. Some of the log may come after the result, which
    /// is waited for a moment, and whose loss costs nothing.
    async fn listen<S>(&mut self, mut stream: S, progress: ProgressFn<'_>) -> Result<(), Fault>
    where
        S: Stream<Item = Result<wire::ImageJoinStreamingResponse, Status>> + Unpin,
    {
        let mut until = None;
        loop {
            let next = match until {
                None => stream.next().await,
                Some(until) => tokio::time::timeout_at(until, stream.next()).await.ok().flatten(),
            };
            let message = match next {
                None => return Ok(()),
                Some(Err(_)) if self.result.is_some() => return Ok(()),
                Some(message) => message?,
            };
            (self.failures, self.is_refused) = (0, false);
            if !message.entry_id.is_empty() {
                self.last_entry = message.entry_id;
            }
            message.task_logs.iter().for_each(|entry| self.log.add(&entry.data, progress));
            if let Some(result) = message.result.filter(is_done)
                && self.result.is_none()
            {
                self.result = Some(result);
                until = Some(tokio::time::Instant::now() + REST_TIME);
            }
        }
    }
}

/// The end of a build's log.
#[derive(Debug, Default)]
struct Log {
    lines: VecDeque<String>,
    /// What has not ended yet.
    partial: String,
}

impl Log {
    fn add(&mut self, text: &str, progress: ProgressFn<'_>) {
        for piece in text.split_inclusive(['\n', '\r']) {
            let room = LOG_LINE_CHARS_MAX.saturating_sub(self.partial.len());
            let kept = piece.trim_end_matches(['\n', '\r']);
            self.partial.extend(kept.chars().filter(|c| !c.is_control()).take(room));
            if piece.len() > kept.len() {
                self.end(progress);
            }
        }
    }

    /// An error with the end of the log.
    fn with(&self, error: Error) -> Error {
        match error {
            Error::Unavailable { what, reason } if !self.lines.is_empty() => {
                let lines = self.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n  ");
                Error::unavailable(what, format!("{reason}\nthe end of its log:\n  {lines}"))
            }
            error => error,
        }
    }

    fn end(&mut self, progress: ProgressFn<'_>) {
        let line = std::mem::take(&mut self.partial);
        if line.trim().is_empty() {
            return;
        }
        if self.lines.len() == LOG_LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line.clone());
        progress(Progress::Log { line });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::stream;

    use super::*;

    #[test]
    fn a_log_is_cut_into_lines_of_bounded_length() {
        let heard = Mutex::new(Vec::new());
        let progress = |event: Progress| {
            if let Progress::Log { line } = event {
                heard.lock().unwrap().push(line);
            }
        };
        let mut log = Log::default();
        for piece in ["Step 1\nSte", "p 2\r\n\x1b[2J\n", &"x".repeat(9999), "\ny"] {
            log.add(piece, &progress);
        }
        log.end(&progress);
        let long = "x".repeat(LOG_LINE_CHARS_MAX);
        assert_eq!(*heard.lock().unwrap(), ["Step 1", "Step 2", "[2J", &long, "y"]);
        (0..100).for_each(|number| log.add(&format!("{number}\n"), &|_| {}));
        assert_eq!(log.lines.len(), LOG_LINES_KEPT);
        assert_eq!(log.lines.back().unwrap(), "99");
    }

    fn said(line: &str) -> Result<wire::ImageJoinStreamingResponse, Status> {
        let task_logs = vec![wire::TaskLogs { data: format!("{line}\n") }];
        Ok(wire::ImageJoinStreamingResponse { task_logs, ..Default::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_is_read_on_after_the_result_and_not_for_ever() {
        let status = GenericStatus::Failure.into();
        let result = wire::GenericResult { status, ..Default::default() };
        let result = || {
            let result = Some(result.clone());
            Ok(wire::ImageJoinStreamingResponse { result, ..Default::default() })
        };
        let lost = || Err(Status::unavailable("gone"));
        for (messages, hangs, lines, has_result) in [
            (vec![said("a"), result(), said("b")], false, vec!["a", "b"], true),
            (vec![said("a"), result(), said("b")], true, vec!["a", "b"], true),
            (vec![result(), said("b"), lost()], false, vec!["b"], true),
            (vec![said("a")], false, vec!["a"], false),
            (vec![said("a"), lost()], false, vec!["a"], false),
        ] {
            let is_lost = messages.last().is_some_and(Result::is_err);
            let rest = if hangs { stream::pending().boxed() } else { stream::empty().boxed() };
            let since = tokio::time::Instant::now();
            let mut heard = Heard::default();
            let listened = heard.listen(stream::iter(messages).chain(rest), &|_| {}).await;
            assert_eq!(heard.log.lines, lines);
            assert_eq!(heard.result.is_some(), has_result, "{lines:?}");
            assert_eq!(listened.is_err(), is_lost && !has_result, "{lines:?}");
            assert_eq!(since.elapsed(), if hangs { REST_TIME } else { Duration::ZERO });
        }
    }

    #[test]
    fn a_failed_build_says_why_and_what_it_said() {
        let result = wire::GenericResult {
            status: GenericStatus::Failure.into(),
            exception: "exit code 1".into(),
            exitcode: 1,
        };
        let mut log = Log::default();
        log.add("No matching distribution found for nothing\n", &|_| {});
        let error = failed("the layer", &result, &log).to_string();
        assert!(error.contains("its build failed: exit code 1"), "{error}");
        assert!(error.contains("\n  No matching distribution"), "{error}");
    }
}
