//! A backend that lies in one way, over one that doesn't: what the suite has to notice.

use std::sync::Arc;

use async_trait::async_trait;
use kaa::lm::UsageSummary;
use kaa::{
    Backend, Capabilities, Context, Environment, EnvironmentOptions, Error, ExecuteOptions,
    Execution, Interrupt, Outcome, Result, Snapshot, Status, Tool, Value, Variable,
};
use serde_json::Value as Json;

/// What it lies about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// Nothing: the suite has nothing to say then.
    Nothing,
    /// The last byte of stdout is missing.
    Stdout,
    /// Text for stderr goes to stdout.
    Streams,
    /// A cell that raised has completed.
    Outcome,
    /// An exception has no message.
    Message,
    /// A cell has no value.
    Value,
    /// Nothing was rolled back, though it was.
    RolledBack,
    /// There is no fuel, though there is.
    Fuel,
    /// There is no rollback, though there is.
    Rollback,
    /// A refused variable was set.
    Set,
    /// A context has the next number but one.
    Index,
    /// A session is poisoned after every reset.
    Status,
    /// A restore does nothing.
    Restore,
    /// A fork is refused as unsupported.
    Fork,
    /// Answers of models are lost.
    LmCalls,
    /// A truncated stream isn't called so.
    Truncated,
    /// The final answer comes without its last character.
    Answer,
    /// The wall time is less than the host was waited for.
    Wall,
}

#[derive(Clone)]
pub(crate) struct Liar {
    pub(crate) inner: Arc<dyn Backend>,
    pub(crate) lie: Lie,
}

struct LiarEnvironment {
    inner: Box<dyn Environment>,
    lie: Lie,
    was_reset: bool,
}

impl Lie {
    fn capabilities(self, mut capabilities: Capabilities) -> Capabilities {
        capabilities.fuel &= self != Self::Fuel;
        capabilities.rollback &= self != Self::Rollback;
        capabilities
    }

    fn execution(self, execution: &mut Execution) {
        match self {
            Self::Stdout => drop(execution.stdout.bytes.pop()),
            Self::Streams => execution.stdout.bytes.append(&mut execution.stderr.bytes),
            Self::Outcome if execution.outcome == Outcome::Raised => {
                execution.outcome = Outcome::Completed;
            }
            Self::Message => {
                if let Some(exception) = &mut execution.exception {
                    exception.message.clear();
                }
            }
            Self::Value => execution.value = None,
            Self::RolledBack => execution.rolled_back = false,
            Self::LmCalls => execution.lm_calls.clear(),
            Self::Truncated => execution.stdout.truncated = false,
            Self::Answer => drop(execution.final_answer.as_mut().and_then(String::pop)),
            Self::Wall => execution.usage.wall = execution.usage.host_wait / 2,
            _ => {}
        }
    }
}

#[async_trait]
impl Backend for Liar {
    fn capabilities(&self) -> Capabilities {
        self.lie.capabilities(self.inner.capabilities())
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        let inner = self.inner.open(options).await?;
        Ok(Box::new(LiarEnvironment { inner, lie: self.lie, was_reset: false }))
    }
}

#[async_trait]
impl Environment for LiarEnvironment {
    fn status(&self) -> Status {
        match self.lie == Lie::Status && self.was_reset {
            true => Status::Poisoned,
            false => self.inner.status(),
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.lie.capabilities(self.inner.capabilities())
    }

    fn interrupt(&self) -> Interrupt {
        self.inner.interrupt()
    }

    async fn execute_opts(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution> {
        let mut execution = self.inner.execute_opts(code, options).await?;
        self.lie.execution(&mut execution);
        Ok(execution)
    }

    async fn set_variable(&mut self, name: &str, value: Value) -> Result<()> {
        match self.inner.set_variable(name, value).await {
            Err(_) if self.lie == Lie::Set => Ok(()),
            result => result,
        }
    }

    async fn get_variable(&mut self, name: &str) -> Result<Option<Value>> {
        self.inner.get_variable(name).await
    }

    async fn list_variables(&mut self) -> Result<Vec<Variable>> {
        self.inner.list_variables().await
    }

    async fn add_context(&mut self, context: Context, index: Option<u32>) -> Result<u32> {
        let index = self.inner.add_context(context, index).await?;
        Ok(index + u32::from(self.lie == Lie::Index))
    }

    async fn add_history(&mut self, messages: &Json, index: Option<u32>) -> Result<u32> {
        self.inner.add_history(messages, index).await
    }

    fn lm_usage(&self) -> UsageSummary {
        self.inner.lm_usage()
    }

    fn register_tool(&mut self, tool: Tool) -> Result<()> {
        self.inner.register_tool(tool)
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        self.inner.snapshot().await
    }

    async fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        match self.lie {
            Lie::Restore => Ok(()),
            _ => self.inner.restore(snapshot).await,
        }
    }

    async fn fork(&mut self) -> Result<Box<dyn Environment>> {
        let backend = self.capabilities().backend;
        match self.lie {
            Lie::Fork => Err(Error::Unsupported { backend, operation: "fork" }),
            _ => self.inner.fork().await,
        }
    }

    async fn reset(&mut self) -> Result<()> {
        self.was_reset = true;
        self.inner.reset().await
    }

    async fn close(self: Box<Self>) -> Result<()> {
        self.inner.close().await
    }
}
