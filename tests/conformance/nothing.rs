//! A backend that others could have made, out of the public API alone: it can do nothing.

use async_trait::async_trait;
use kaa::lm::UsageSummary;
use kaa::{
    Backend, Capabilities, Context, Environment, EnvironmentOptions, Error, ExecuteOptions,
    Execution, Interrupt, Limits, Outcome, Result, Snapshot, Status, Tool, ToolArgs, Value,
    Variable,
};
use serde_json::Value as Json;

pub(crate) struct Nothing;

/// Every cell calls the last of its tools, whatever its code.
struct NothingEnvironment(Vec<Tool>);

fn unsupported<T>(operation: &'static str) -> Result<T> {
    Err(Error::Unsupported { backend: "nothing", operation })
}

#[async_trait]
impl Backend for Nothing {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none("nothing")
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        options.limits.validate()?;
        if options.limits.fuel < Limits::default().fuel {
            return unsupported("limits.fuel");
        }
        Ok(Box::new(NothingEnvironment(options.tools)))
    }
}

#[async_trait]
impl Environment for NothingEnvironment {
    fn status(&self) -> Status {
        Status::Ready
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none("nothing")
    }

    fn interrupt(&self) -> Interrupt {
        Interrupt::new(|| {})
    }

    async fn execute_opts(&mut self, _code: &str, _options: ExecuteOptions) -> Result<Execution> {
        let mut execution = Execution::new(Outcome::Completed);
        if let Some(tool) = self.0.last() {
            let answer = tool.call(ToolArgs::default()).await;
            execution.value = answer.ok().and_then(|value| value.as_i64()).map(|n| n.to_string());
        }
        Ok(execution)
    }

    async fn set_variable(&mut self, _name: &str, _value: Value) -> Result<()> {
        unsupported("set_variable")
    }

    async fn get_variable(&mut self, _name: &str) -> Result<Option<Value>> {
        unsupported("get_variable")
    }

    async fn list_variables(&mut self) -> Result<Vec<Variable>> {
        Ok(Vec::new())
    }

    async fn add_context(&mut self, _context: Context, _index: Option<u32>) -> Result<u32> {
        unsupported("add_context")
    }

    async fn add_history(&mut self, _messages: &Json, _index: Option<u32>) -> Result<u32> {
        unsupported("add_history")
    }

    fn lm_usage(&self) -> UsageSummary {
        UsageSummary::default()
    }

    fn register_tool(&mut self, tool: Tool) -> Result<()> {
        self.0.push(tool);
        Ok(())
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        unsupported("snapshot")
    }

    async fn restore(&mut self, _snapshot: &Snapshot) -> Result<()> {
        unsupported("restore")
    }

    async fn fork(&mut self) -> Result<Box<dyn Environment>> {
        unsupported("fork")
    }

    async fn reset(&mut self) -> Result<()> {
        Ok(())
    }

    async fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
