//! The conversation with a guest, without a guest.

use std::fmt;

use crate::agent::{Answer, Conversation, Request, Streams};
use crate::environment::{EnvironmentOptions, Execution, Variable};
use crate::error::Result;
use crate::limits::Usage;
use crate::protocol::Call;
use crate::value::Value;
use crate::wasm;

/// The host's side of a session whose guest is the caller.
pub struct Talk(Conversation);

/// What a turn asks of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// To run a cell.
    Cell,
    /// The value of a variable.
    Variable,
    /// The names of all.
    Variables,
    /// To take a history.
    History,
}

/// What the host makes of the guest's reply.
#[derive(Debug)]
pub enum Reply {
    /// Of a cell.
    Cell(Box<Execution>),
    /// Of a variable.
    Variable(Option<Value>),
    /// Of all.
    Variables(Vec<Variable>),
    /// The number of a history.
    History(u32),
}

impl Talk {
    /// A session with these options.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a tool whose name can't be used.
    pub fn new(options: &EnvironmentOptions) -> Result<Self> {
        Conversation::new(options, [7; 16]).map(Self)
    }

    /// Begins a turn.
    ///
    /// # Errors
    ///
    /// None: the requests are good ones.
    pub fn begin(&mut self, ask: Ask, options: &EnvironmentOptions) -> Result<()> {
        let request = match ask {
            Ask::Cell => self.0.cell("1 + 1"),
            Ask::Variable => Request::get("x")?.message,
            Ask::Variables => Request::list().message,
            Ask::History => Request::history(&serde_json::json!([]), None).message,
        };
        self.0.begin(Some(request), &options.limits);
        Ok(())
    }

    /// The host's answer to a frame of a guest with this memory, as bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] for what no agent says.
    pub async fn say(&mut self, frame: &[u8], memory: &[u8]) -> Result<Vec<u8>> {
        let call = match Call::from_bytes(frame)? {
            Call::Message(message) => Call::Message(wasm::collect_pieces(message, memory)?),
            prompt @ Call::Prompt { .. } => prompt,
        };
        let reply = match self.0.answer(call)? {
            Answer::Now(reply) => reply,
            Answer::Later(outside) => {
                let done = outside.await;
                self.0.finish(done)
            }
        };
        let bytes = [&reply.head()[..], &reply.body].concat();
        self.0.take_back(reply);
        Ok(bytes)
    }

    /// Ends the turn.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the guest didn't reply to everything, or not with that; [`Error::Invalid`]
    /// when it refused.
    pub fn end(&mut self, ask: Ask) -> Result<Reply> {
        let reply = self.0.take_reply()?;
        let reply = match ask {
            Ask::Cell => {
                let execution = self.0.execution(reply, Streams::new(0), Usage::default())?;
                Reply::Cell(Box::new(execution))
            }
            Ask::Variable => Reply::Variable(Conversation::value_of("x", reply)?),
            Ask::Variables => Reply::Variables(Conversation::variables_of(reply)?),
            Ask::History => Reply::History(Conversation::index_of(&reply)?),
        };
        self.0.keep();
        Ok(reply)
    }
}

impl fmt::Debug for Talk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Talk")
    }
}
