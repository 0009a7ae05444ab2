//! What the user adds to the session: functions of the host, Python code, data.

use crate::agent::{check_name, check_reserved};
use crate::environment::{Environment, ExecuteOptions, Outcome, Tool};
use crate::error::{Error, Result};
use crate::value::Value;

/// A function or a value that cells find by name, and that the model is told about.
///
/// ```
/// use kaa::{RlmTool, Tool, Value};
///
/// let search = Tool::new("search", |_| Ok(Value::from("nothing found")));
/// let tools = [
///     RlmTool::host(search).described("search(text): looks the text up in the catalogue"),
///     RlmTool::code("double", "def double(x):\n    return 2 * x"),
///     RlmTool::value("limit", 100),
/// ];
/// assert_eq!(tools[1].name(), "double");
/// ```
#[derive(Debug, Clone)]
pub struct RlmTool {
    name: String,
    description: Option<String>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Host(Tool),
    Code(String),
    Value(Value),
}

impl RlmTool {
    /// A function of the host.
    #[must_use]
    pub fn host(tool: Tool) -> Self {
        Self { name: tool.name().to_owned(), description: None, kind: Kind::Host(tool) }
    }

    /// Python code that defines `name`, run in the session before anything else.
    #[must_use]
    pub fn code(name: impl Into<String>, code: impl Into<String>) -> Self {
        Self { name: name.into(), description: None, kind: Kind::Code(code.into()) }
    }

    /// A variable.
    #[must_use]
    pub fn value(name: impl Into<String>, value: impl Into<Value>) -> Self {
        Self { name: name.into(), description: None, kind: Kind::Value(value.into()) }
    }

    /// What the model is told about it.
    #[must_use]
    pub fn described(self, description: impl Into<String>) -> Self {
        Self { description: Some(description.into()), ..self }
    }

    /// The name that cells use.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its line in the system prompt, in RLM's form.
    pub(super) fn line(&self) -> String {
        let about = match (&self.description, &self.kind) {
            (Some(description), _) => description.clone(),
            (None, Kind::Value(value)) => format!("A custom {} value", value.type_name()),
            (None, _) => "A custom function".into(),
        };
        format!("- `{}`: {about}", self.name)
    }

    pub(super) fn as_host(&self) -> Option<&Tool> {
        match &self.kind {
            Kind::Host(tool) => Some(tool),
            _ => None,
        }
    }

    /// Makes it known to a session; functions of the host already are.
    pub(super) async fn define(&self, environment: &mut dyn Environment) -> Result<()> {
        match &self.kind {
            Kind::Host(_) => Ok(()),
            Kind::Value(value) => environment.set_variable(&self.name, value.clone()).await,
            Kind::Code(code) => {
                // The name alone raises when the code doesn't define it.
                let cell = format!("{code}\n{}\n", self.name);
                let what = format!("the code of tool `{}`", self.name);
                run_setup(environment, &cell, &what).await
            }
        }
    }
}

/// Runs code that must not fail.
pub(super) async fn run_setup(
    environment: &mut dyn Environment,
    code: &str,
    what: &str,
) -> Result<()> {
    let execution = environment.execute_opts(code, ExecuteOptions::default()).await?;
    if execution.outcome == Outcome::Completed {
        return Ok(());
    }
    Err(Error::invalid(what, execution.stderr.text().trim().to_owned()))
}

/// Whether these names can be used.
pub(super) fn check(tools: &[RlmTool]) -> Result<()> {
    tools.iter().try_for_each(|tool| check_name("tool", &tool.name))?;
    check_reserved(tools.iter().map(|tool| tool.name.as_str()))?;
    for (at, tool) in tools.iter().enumerate() {
        if tools[..at].iter().any(|other| other.name == tool.name) {
            return Err(Error::invalid("tools", format!("there are two named `{}`", tool.name)));
        }
    }
    Ok(())
}
