//! What the session of a case is opened with: limits, policy, a model and tools by well-known names.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use super::values::json_of;
use crate::environment::{EnvironmentOptions, Profile, Tool, ToolError, ToolResult};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::lm::{LmCompletion, LmError, LmHandler, LmRequest, ScriptedHandler};
use crate::policy::{Clock, Policy};
use crate::value::Value;

/// The options of a session. What is left out is the default of [`EnvironmentOptions`].
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Setup {
    profile: Option<String>,
    limits: LimitsSetup,
    policy: PolicySetup,
    output_chars: Option<usize>,
    depth: u16,
    lm: Option<toml::Value>,
    tools: Vec<String>,
}

/// The fields of [`Limits`], durations in milliseconds.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LimitsSetup {
    fuel: Option<u64>,
    compute_ms: Option<u64>,
    wall_ms: Option<u64>,
    grace_ms: Option<u64>,
    memory_bytes: Option<u64>,
    output_bytes: Option<u64>,
    lm_calls: Option<u32>,
    lm_concurrency: Option<u32>,
    tool_calls: Option<u32>,
    disk_bytes: Option<u64>,
}

impl LimitsSetup {
    /// These limits, but for those that the case names.
    pub(super) fn over(&self, base: Limits) -> Limits {
        let time = |ms: Option<u64>, base| ms.map_or(base, Duration::from_millis);
        Limits {
            fuel: self.fuel.unwrap_or(base.fuel),
            compute: time(self.compute_ms, base.compute),
            wall: time(self.wall_ms, base.wall),
            grace: time(self.grace_ms, base.grace),
            memory_bytes: self.memory_bytes.unwrap_or(base.memory_bytes),
            output_bytes: self.output_bytes.unwrap_or(base.output_bytes),
            lm_calls: self.lm_calls.unwrap_or(base.lm_calls),
            lm_concurrency: self.lm_concurrency.unwrap_or(base.lm_concurrency),
            tool_calls: self.tool_calls.unwrap_or(base.tool_calls),
            disk_bytes: self.disk_bytes.unwrap_or(base.disk_bytes),
        }
    }
}

#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PolicySetup {
    env: std::collections::BTreeMap<String, String>,
    clock_ns: Option<u64>,
    seed: Option<u64>,
    allowed_imports: Option<Vec<String>>,
}

impl Setup {
    /// The options for a backend. LM calls are counted by `desk`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a profile, a model or a tool that the suite doesn't know.
    pub(super) fn options(&self, desk: &Arc<Desk>) -> Result<EnvironmentOptions> {
        let profile = match self.profile.as_deref() {
            None => Profile::default(),
            Some(name) => *[Profile::Rlm, Profile::OpenEnv]
                .iter()
                .find(|profile| profile.name() == name)
                .ok_or_else(|| unknown("profile", name, "rlm and openenv"))?,
        };
        let policy = Policy {
            env: self.policy.env.clone().into_iter().collect(),
            clock: self.policy.clock_ns.map_or(Clock::Real, Clock::Fixed),
            seed: self.policy.seed,
            allowed_imports: self.policy.allowed_imports.clone(),
            ..Policy::default()
        };
        let lm = self.lm.as_ref().map(|lm| desk.handler(lm)).transpose()?;
        let tools = self.tools.iter().map(|name| tool(name, name)).collect::<Result<_>>()?;
        Ok(EnvironmentOptions {
            limits: self.limits.over(Limits::default()),
            policy,
            profile,
            output_chars: self.output_chars,
            lm,
            depth: self.depth,
            tools,
            tenant: None,
        })
    }

    /// The limits of its session.
    pub(super) fn limits(&self) -> Limits {
        self.limits.over(Limits::default())
    }
}

fn unknown(what: &str, name: &str, known: &str) -> Error {
    Error::invalid(format!("{what} `{name}`"), format!("the suite knows {known}"))
}

/// The models of a case, and how many of their calls were under way at once.
#[derive(Debug, Default)]
pub(super) struct Desk {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Desk {
    /// The most calls at once since it was last asked.
    pub(super) fn take_most(&self) -> usize {
        self.most.swap(0, Ordering::SeqCst)
    }

    /// `"echo"`, `"fail"`, `"slow"`, `"never"`, `"depth"`, or a script of a [`ScriptedHandler`].
    fn handler(self: &Arc<Self>, lm: &toml::Value) -> Result<Arc<dyn LmHandler>> {
        let (answers, latency) = match lm.as_str() {
            Some("echo") => (ScriptedHandler::echo(), Duration::ZERO),
            Some("fail") => (failing(), Duration::ZERO),
            Some("slow") => (ScriptedHandler::echo(), Duration::from_millis(150)),
            Some("never") => (ScriptedHandler::echo(), Duration::MAX),
            Some("depth") => (
                ScriptedHandler::from_fn(|request| {
                    let model = request.model.as_deref().unwrap_or("no model");
                    Ok(format!("{:?} at {}, {model}", request.kind, request.depth))
                }),
                Duration::ZERO,
            ),
            Some(name) => {
                return Err(unknown("model", name, "echo, fail, slow, never, depth and scripts"));
            }
            None => {
                let json = json_of(lm).map_err(|reason| Error::invalid("lm", reason))?;
                (ScriptedHandler::from_json(&json.to_string())?, Duration::ZERO)
            }
        };
        Ok(Arc::new(Clerk { desk: Arc::clone(self), answers, latency }))
    }
}

fn failing() -> ScriptedHandler {
    ScriptedHandler::from_fn(|request| match &*request.prompt.to_text() {
        text if text.contains("fine") => Ok(text.to_owned()),
        _ => Err(LmError::new("kaput")),
    })
}

/// Answers, and is counted while it does.
struct Clerk {
    desk: Arc<Desk>,
    answers: ScriptedHandler,
    latency: Duration,
}

/// A call that is under way, also when it is given up.
struct UnderWay<'a>(&'a Desk);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl LmHandler for Clerk {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let now = self.desk.now.fetch_add(1, Ordering::SeqCst) + 1;
        let _under_way = UnderWay(&self.desk);
        self.desk.most.fetch_max(now, Ordering::SeqCst);
        match self.latency {
            Duration::ZERO => {}
            Duration::MAX => std::future::pending().await,
            latency => tokio::time::sleep(latency).await,
        }
        self.answers.complete(request).await
    }
}

/// The tool that the suite knows as `tool`, under a name of its own.
///
/// # Errors
///
/// [`Error::Invalid`] for a tool that it doesn't know.
pub(super) fn tool(tool: &str, name: &str) -> Result<Tool> {
    Ok(match tool {
        "add" => Tool::new(name, |call| match (&call.args[..], &call.kwargs[..]) {
            ([Value::Int(a), Value::Int(b)], []) => Ok(Value::Int(a + b)),
            _ => Err(ToolError::of_type("TypeError", "add(a, b) takes two integers")),
        }),
        "seven" => Tool::new(name, |_| Ok(Value::Int(7))),
        "echo" => Tool::new(name, |call| first(call.args)),
        "later" => Tool::new_async(name, |call| async move {
            tokio::task::yield_now().await;
            first(call.args)
        }),
        "show" => Tool::new(name, |call| {
            let named = |(name, value)| Value::List(vec![Value::Str(name), value]);
            let named = call.kwargs.into_iter().map(named).collect();
            Ok(Value::List(vec![Value::List(call.args), Value::List(named)]))
        }),
        "fail" => Tool::new(name, |call| match &call.args[..] {
            [Value::Str(class), Value::Str(message)] => {
                Err(ToolError::of_type(class.as_str(), message.as_str()))
            }
            _ => Err(ToolError::new("fail(type, message) takes two texts")),
        }),
        "nap" => Tool::new_async(name, |call| async move {
            let ms = call.args.first().and_then(Value::as_i64).unwrap_or(0);
            tokio::time::sleep(Duration::from_millis(u64::try_from(ms).unwrap_or(0))).await;
            Ok(Value::None)
        }),
        "never" => Tool::new_async(name, |_| std::future::pending()),
        _ => {
            let known = "add, seven, echo, later, show, fail, nap and never";
            return Err(unknown("tool", tool, known));
        }
    })
}

fn first(args: Vec<Value>) -> ToolResult {
    Ok(args.into_iter().next().unwrap_or(Value::None))
}
