//! Running a case over a backend, step by step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value as Json, json};

use super::case::{Action, Case, How, MAIN, NEEDS, Step};
use super::differences::{Differences, Row};
use super::expect::{Mismatch, Observation};
use super::observe;
use super::setup::{Desk, Setup, tool};
use super::{Failure, Verdict};
use crate::environment::{
    Backend, Capabilities, Environment, EnvironmentExt, ExecuteOptions, Outcome, Status,
};
use crate::error::{Error, Result};
use crate::snapshot::Snapshot;

/// How long a step may take: more means that the environment hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a case over a backend.
///
/// # Errors
///
/// A [`Failure`] whose text says which step gave what instead of what.
pub async fn run(
    case: &Case,
    backend: &dyn Backend,
    differences: &Differences,
) -> Result<Verdict, Failure> {
    let mut play = Play {
        case,
        backend,
        capabilities: backend.capabilities(),
        desk: Arc::default(),
        sessions: BTreeMap::new(),
        snapshots: BTreeMap::new(),
    };
    let mut verdict = Verdict::Passed;
    let opened = play.patiently(async |play| play.open(MAIN, &case.front.session).await).await;
    match opened.ok_or_else(|| play.failure(0, "it wasn't opened in time".into()))? {
        Ok(()) => {}
        Err(Error::Unsupported { .. }) if play.lacks().is_some() => {
            return Ok(play.lacks().map_or(Verdict::Passed, Verdict::Lacks));
        }
        Err(error) => return Err(play.failure(0, format!("opening the session: {error}"))),
    }
    for (at, step) in case.steps.iter().enumerate() {
        let observed = play.patiently(async |play| play.perform(step).await).await;
        let observed = observed
            .ok_or_else(|| play.failure(at + 1, format!("nothing came of it for {PATIENCE:?}")))?;
        let observation = observed.map_err(|reason| play.failure(at + 1, reason))?;
        if let Some(lacks) = play.ends_for_lack(step, &observation) {
            let ending = lacks.map_err(|reason| play.failure(at + 1, reason))?;
            if ending == "rollback" {
                play.recover(step).await.map_err(|reason| play.failure(at + 1, reason))?;
            }
            return Ok(Verdict::Lacks(ending));
        }
        let row = differences.of(case.name(), at + 1, play.capabilities.backend);
        judge(step, row, &observation).map_err(|reason| play.failure(at + 1, reason))?;
        if let Some(row) = row {
            verdict = Verdict::Differs;
            if row.ends {
                return Ok(verdict);
            }
        }
    }
    match play.lacks() {
        Some(lacked) if verdict == Verdict::Passed => Err(play.failure(
            case.steps.len(),
            format!("the backend says that it has no {lacked}, but did all that needs it"),
        )),
        _ => Ok(verdict),
    }
}

/// Whether a step gave what it has to, or what the table of differences says.
fn judge(step: &Step, row: Option<&Row>, observation: &Observation) -> Result<(), String> {
    let Some(row) = row else { return listed(&step.expected.compare(observation), observation) };
    let common = match row.instead.is_about_error() {
        true => step.expected.clone(),
        false => step.expected.replaced(&row.instead),
    };
    if common.compare(observation).is_empty() {
        let reason = "the table of differences has a row for this step that isn't needed: \
                      the common answer came";
        return Err(reason.into());
    }
    let expected = match row.instead.is_about_error() {
        true => row.instead.clone(),
        false => step.expected.overlaid(&row.instead),
    };
    listed(&expected.compare(observation), observation)
}

/// The mismatches as a text, with what explains them.
pub(super) fn listed(mismatches: &[Mismatch], observation: &Observation) -> Result<(), String> {
    if mismatches.is_empty() {
        return Ok(());
    }
    let error = observation.get("error").filter(|error| !error.is_null());
    // Where the step itself failed, nothing else came of it.
    let told = mismatches.iter().filter(|one| error.is_none() || one.is_about_error());
    let mut text: Vec<String> = told.map(ToString::to_string).collect();
    for explains in ["stderr", "error"] {
        if let Some(found) = observation.get(explains).filter(|found| !found.is_null()) {
            text.push(format!("{explains} is {}", super::expect::short(found)));
        }
    }
    Err(text.join("\n"))
}

/// One case under way.
struct Play<'a> {
    case: &'a Case,
    backend: &'a dyn Backend,
    capabilities: Capabilities,
    desk: Arc<Desk>,
    sessions: BTreeMap<String, Open>,
    snapshots: BTreeMap<String, Snapshot>,
}

struct Open {
    environment: Box<dyn Environment>,
    setup: Setup,
}

impl Play<'_> {
    fn failure(&self, step: usize, reason: String) -> Failure {
        Failure::new(self.case, step, self.capabilities.backend, reason)
    }

    async fn patiently<T>(&mut self, act: impl AsyncFnOnce(&mut Self) -> T) -> Option<T> {
        tokio::time::timeout(PATIENCE, act(self)).await.ok()
    }

    /// The first capability that the case needs and the backend says it doesn't have.
    fn lacks(&self) -> Option<&'static str> {
        let has = |name: &str| match name {
            "fuel" => self.capabilities.fuel,
            "rollback" => self.capabilities.rollback,
            "snapshot" => self.capabilities.snapshot,
            _ => self.capabilities.deterministic,
        };
        NEEDS.iter().copied().find(|need| self.case.needs(need) && !has(need))
    }

    /// Whether the case is over here because the backend can't do what it needs, and said so.
    fn ends_for_lack(
        &self,
        step: &Step,
        observation: &Observation,
    ) -> Option<Result<&'static str, String>> {
        let lacked = self.lacks()?;
        if observation.get("error_kind") == Some(&"Unsupported".into()) {
            return Some(Ok(lacked));
        }
        let Action::Cell { how, .. } = &step.action else { return None };
        let wants = how.drop_after_ms.is_some() || step.expected.is("rolled_back", &true.into());
        if lacked != "rollback" || !wants {
            return None;
        }
        let expected: Observation = match how.drop_after_ms {
            Some(_) => [("finished", json!(false)), ("status", json!("poisoned"))].into(),
            None => [("rolled_back", json!(false)), ("status", json!("poisoned"))].into(),
        };
        let is_met = expected.iter().all(|(key, value)| observation.get(key) == Some(value));
        let reason = "without rollback this step has to leave the session poisoned";
        Some(is_met.then_some("rollback").ok_or_else(|| format!("{reason}: {observation:?}")))
    }

    /// A poisoned session refuses cells until it's reset.
    async fn recover(&mut self, step: &Step) -> Result<(), String> {
        let session = self.session(&step.session)?;
        match session.environment.execute("1").await {
            Err(Error::Poisoned { .. }) => {}
            other => return Err(format!("a poisoned session answered {other:?}")),
        }
        session.environment.reset().await.map_err(|e| format!("reset: {e}"))?;
        match session.environment.execute("40 + 2").await {
            Ok(cell) if cell.value.as_deref() == Some("42") => Ok(()),
            other => Err(format!("after its reset the session answered {other:?}")),
        }
    }

    fn session(&mut self, name: &str) -> Result<&mut Open, String> {
        self.sessions.get_mut(name).ok_or_else(|| format!("there is no session `{name}`"))
    }

    async fn open(&mut self, name: &str, setup: &Setup) -> Result<()> {
        let environment = self.backend.open(setup.options(&self.desk)?).await?;
        // What a backend can do may be known only when it has opened a session.
        self.capabilities = self.backend.capabilities();
        let (promised, found) = (&self.capabilities, environment.capabilities());
        if *promised != found {
            return Err(Error::Internal(format!(
                "the backend promises {promised:?}, its session {found:?}"
            )));
        }
        let open = Open { environment, setup: setup.clone() };
        self.sessions.insert(name.to_owned(), open);
        Ok(())
    }

    /// What comes of a step; an error only when the case itself makes no sense.
    async fn perform(&mut self, step: &Step) -> Result<Observation, String> {
        let name = step.session.as_str();
        let mut seen = Observation::new();
        let done = match &step.action {
            Action::Open { name, setup } => self.open(name, setup).await,
            Action::Close => {
                let session = self.sessions.remove(name);
                let session = session.ok_or_else(|| format!("there is no session `{name}`"))?;
                observe::error(&mut seen, session.environment.close().await.err().as_ref());
                return Ok(seen);
            }
            Action::Fork { name: other } => {
                let session = self.session(name)?;
                let setup = session.setup.clone();
                let forked = session.environment.fork().await;
                forked.map(|environment| {
                    self.sessions.insert(other.clone(), Open { environment, setup });
                })
            }
            Action::Snapshot { name: saved } => {
                let snapshot = self.session(name)?.environment.snapshot().await;
                snapshot.map(|snapshot| {
                    self.snapshots.insert(saved.clone(), snapshot);
                })
            }
            Action::Restore { name: saved } => {
                let snapshot = self.snapshots.get(saved).cloned();
                let snapshot = snapshot.ok_or_else(|| format!("no snapshot `{saved}`"))?;
                self.session(name)?.environment.restore(&snapshot).await
            }
            Action::Cell { code, how } => {
                let desk = Arc::clone(&self.desk);
                let fuel = self.capabilities.fuel;
                let session = self.session(name)?;
                return cell(session, code, how, fuel, &desk).await;
            }
            action => simple(&mut *self.session(name)?.environment, action, &mut seen).await,
        };
        observe::error(&mut seen, done.err().as_ref());
        if let Some(session) = self.sessions.get(name) {
            seen.insert("status", status(&*session.environment));
        }
        Ok(seen)
    }
}

fn status(environment: &dyn Environment) -> Json {
    match environment.status() {
        Status::Ready => "ready".into(),
        Status::Poisoned => "poisoned".into(),
    }
}

/// Steps that only ask one session for something.
async fn simple(
    environment: &mut dyn Environment,
    action: &Action,
    seen: &mut Observation,
) -> Result<()> {
    match action {
        Action::Set { name, value } => environment.set_variable(name, value.clone()).await,
        Action::Get { name } => {
            let value = environment.get_variable(name).await?;
            seen.insert("found", value.is_some().into());
            seen.insert("value", value.map_or(Json::Null, |value| super::values::shown(&value)));
            Ok(())
        }
        Action::Variables => {
            let variables = environment.list_variables().await?;
            observe::variables(seen, &variables);
            Ok(())
        }
        Action::Context { index, context } => {
            let index = environment.add_context(context.clone(), *index).await?;
            seen.insert("index", index.into());
            Ok(())
        }
        Action::History { index, messages } => {
            let index = environment.add_history(messages, *index).await?;
            seen.insert("index", index.into());
            Ok(())
        }
        Action::Usage => {
            let usage = environment.lm_usage();
            seen.insert("calls", usage.calls().into());
            let models = usage.models().map(|one| format!("{}: {}", one.model, one.calls));
            seen.insert("models", models.collect());
            Ok(())
        }
        Action::Tool { tool: known, name } => environment.register_tool(tool(known, name)?),
        Action::Interrupt => {
            environment.interrupt().interrupt();
            Ok(())
        }
        Action::Reset => environment.reset().await,
        _ => Err(Error::Internal("a step that isn't simple".into())),
    }
}

/// A cell, perhaps with somebody who interrupts it or gives it up.
async fn cell(
    session: &mut Open,
    code: &str,
    how: &How,
    has_fuel: bool,
    desk: &Desk,
) -> Result<Observation, String> {
    let limits = how.limits.as_ref().map(|limits| limits.over(session.setup.limits()));
    let interrupt = session.environment.interrupt();
    let mut seen = Observation::new();
    desk.take_most();
    let execute = session.environment.execute_opts(code, ExecuteOptions { limits });
    let result = match (how.interrupt_after_ms, how.drop_after_ms) {
        (Some(ms), _) => {
            let interrupts = async {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                interrupt.interrupt();
            };
            Ok(futures_util::future::join(execute, interrupts).await.0)
        }
        (None, Some(ms)) => tokio::time::timeout(Duration::from_millis(ms), execute).await,
        (None, None) => Ok(execute.await),
    };
    match result {
        Ok(Ok(execution)) => {
            observe::invariants(&execution, has_fuel)?;
            observe::execution(&mut seen, &execution);
            if execution.rolled_back && !session.environment.capabilities().rollback {
                return Err("a backend without rollback says that it rolled back".into());
            }
            if execution.outcome == Outcome::LimitReached && execution.limit.is_none() {
                return Err("a limit was reached that nobody names".into());
            }
            observe::error(&mut seen, None);
        }
        Ok(Err(error)) => observe::error(&mut seen, Some(&error)),
        Err(_) => observe::error(&mut seen, None),
    }
    if how.drop_after_ms.is_some() {
        let finished = seen.contains_key("outcome") || seen["error"] != Json::Null;
        seen.insert("finished", finished.into());
    }
    seen.insert("at_once", desk.take_most().into());
    seen.insert("status", status(&*session.environment));
    Ok(seen)
}
