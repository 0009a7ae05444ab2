//! What the host asks of an agent beside running cells, and what it makes of the replies.

use serde_json::{Value as Json, json};

use super::{Conversation, check_name, variables};
use crate::environment::{Context, Variable};
use crate::error::{Error, Result};
use crate::protocol::{Message, VariableReport, decode_value};
use crate::value::Value;

/// A request, and what it's about: the first words of errors.
pub(crate) struct Request {
    pub(crate) what: String,
    pub(crate) message: Message,
}

impl Request {
    /// Binds a variable.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a name that none can have.
    pub(crate) fn set(name: &str, value: &Value) -> Result<Self> {
        check_name("variable", name)?;
        let mut message = Message::new(json!({ "op": "set", "name": name }));
        message.put("value", value);
        Ok(Self { what: format!("variable `{name}`"), message })
    }

    /// Reads a variable.
    ///
    /// # Errors
    ///
    /// As [`set`](Self::set).
    pub(crate) fn get(name: &str) -> Result<Self> {
        check_name("variable", name)?;
        let message = Message::new(json!({ "op": "get", "name": name }));
        Ok(Self { what: format!("variable `{name}`"), message })
    }

    /// Lists the variables.
    pub(crate) fn list() -> Self {
        Self { what: "variables".into(), message: Message::new(json!({ "op": "vars" })) }
    }

    /// Adds a context.
    pub(crate) fn context(context: Context, index: Option<u32>) -> Self {
        let (kind, body) = match context {
            Context::Text(body) => ("text", body),
            Context::Bytes(body) => ("bytes", body),
            Context::Json(body) => ("json", body),
        };
        let mut message = Message::new(json!({ "op": "context", "index": index, "kind": kind }));
        message.letter = kind != "bytes";
        message.body = body;
        Self { what: "context".into(), message }
    }

    /// Adds a history.
    pub(crate) fn history(messages: &Json, index: Option<u32>) -> Self {
        let mut message = Message::new(json!({ "op": "history", "index": index }));
        message.letter = true;
        message.body = messages.to_string().into_bytes();
        Self { what: "history".into(), message }
    }
}

impl Conversation {
    /// The value of a variable, from the reply to [`Request::get`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when it has none outside the session.
    pub(crate) fn value_of(what: &str, mut reply: Message) -> Result<Option<Value>> {
        if let Some(type_name) = reply.text("unrepresentable") {
            let repr = reply.text("repr").unwrap_or_default();
            let reason = format!("a {type_name} has no value outside the session: {repr}");
            return Err(Error::invalid(what, reason));
        }
        match reply.header.remove("value") {
            Some(value) => decode_value(value, &reply.body).map(Some),
            None => Ok(None),
        }
    }

    /// The variables, from the reply to [`Request::list`].
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when it's none.
    pub(crate) fn variables_of(reply: Message) -> Result<Vec<Variable>> {
        #[derive(serde::Deserialize)]
        struct Report {
            variables: Vec<VariableReport>,
        }
        let (report, _) = reply.parse::<Report>()?;
        Ok(variables(report.variables))
    }

    /// The number of a context or history that the agent took.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the reply has none.
    pub(crate) fn index_of(reply: &Message) -> Result<u32> {
        let index = reply.header.get("index").and_then(Json::as_u64);
        index
            .and_then(|index| u32::try_from(index).ok())
            .ok_or_else(|| Error::protocol("the reply to a context has no index"))
    }
}
