//! Results of cells that never ran.

use std::time::Duration;

use super::Streams;
use crate::environment::{Exception, Execution, Outcome};
use crate::limits::{Limit, Limits, Usage};

/// The result of a cell that was interrupted while it waited to begin; `fuel` is what it spent, where
/// that is counted.
pub(crate) fn not_begun(limits: &Limits, fuel: Option<u64>, waited: Duration) -> Execution {
    let message = "interrupted before the cell began".to_owned();
    let line = format!("KeyboardInterrupt: {message}\n");
    let mut streams = Streams::new(limits.output_bytes);
    streams.stderr.write(line.as_bytes());
    Execution {
        limit: Some(Limit::Interrupt),
        stdout: streams.stdout.into_output(None),
        stderr: streams.stderr.into_output(None),
        exception: Some(Exception {
            type_name: "KeyboardInterrupt".into(),
            message,
            traceback: line,
        }),
        usage: Usage { fuel, wall: waited, ..Usage::default() },
        ..Execution::new(Outcome::Raised)
    }
}
