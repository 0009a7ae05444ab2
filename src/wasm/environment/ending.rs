//! Results of cells that didn't come to an end of their own.

use super::{Phase, WasmEnvironment};
use crate::environment::{Exception, Execution, Outcome};
use crate::error::{Error, Result};
use crate::limits::{Limit, Usage};
use crate::wasm::session::TurnEnd;

/// What a process killed by `SIGABRT` would have exited with: a trap of the guest.
const EXIT_ABORTED: i32 = 134;

/// Why a cell was rolled back.
struct Reason {
    outcome: Outcome,
    limit: Option<Limit>,
    type_name: &'static str,
    message: String,
}

impl WasmEnvironment {
    /// The result of a cell that the host ended, and the rollback that goes with it.
    pub(super) fn stopped(&mut self, end: TurnEnd, usage: Usage) -> Result<Execution> {
        let Phase::Ready(session) = &mut self.phase else {
            return Err(Error::Internal("a cell ended without a session".into()));
        };
        let guest = session.guest_mut();
        if let Some(fault) = guest.fault.take() {
            self.roll_back()?;
            return Err(fault);
        }
        let limit = guest.budget.stopped_by();
        let (outcome, type_name, message) = match end {
            TurnEnd::Exited(code) => (
                Outcome::Exited { code },
                "SystemExit",
                format!("the interpreter exited with {code}"),
            ),
            TurnEnd::Trapped(trap) => (Outcome::Exited { code: EXIT_ABORTED }, "Trap", trap),
            _ => {
                let name = limit.map_or("?", Limit::name);
                (
                    Outcome::LimitReached,
                    "LimitReached",
                    format!("the cell did not yield to the {name} limit within the grace"),
                )
            }
        };
        self.rolled_back(Reason { outcome, limit, type_name, message }, usage)
    }

    /// The result of a cell that left no memory to report it with, and the rollback that goes with it:
    /// in what is left, the next cell couldn't free any.
    pub(super) fn out_of_memory(&mut self, usage: Usage) -> Result<Execution> {
        let bytes = self.options.limits.memory_bytes;
        let message = format!("no room for the report of the cell in {bytes} bytes of memory");
        let (outcome, type_name) = (Outcome::Raised, "MemoryError");
        self.rolled_back(Reason { outcome, limit: None, type_name, message }, usage)
    }

    fn rolled_back(&mut self, reason: Reason, usage: Usage) -> Result<Execution> {
        let Phase::Ready(session) = &mut self.phase else {
            return Err(Error::Internal("a cell ended without a session".into()));
        };
        let Reason { outcome, limit, type_name, message } = reason;
        let guest = session.guest_mut();
        let mut streams = std::mem::take(&mut guest.streams);
        let line = format!(
            "{type_name}: {message}; the session was rolled back to the state before this cell\n"
        );
        streams.stderr.write(line.as_bytes());
        let mut execution = guest.conversation.stopped(outcome, streams, usage);
        execution.limit = limit;
        execution.rolled_back = true;
        execution.exception =
            Some(Exception { type_name: type_name.into(), message, traceback: line });
        self.roll_back()?;
        Ok(execution)
    }
}
