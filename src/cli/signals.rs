//! Signals that want a command to end: Ctrl-C and SIGTERM.

use std::ops::ControlFlow;
use std::time::Duration;

use kaa::Environment;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Ending, Failure};

/// How long a signal waits for a session that is being made: half of one can't be closed.
const OPENING_TIME: Duration = Duration::from_secs(15);

/// From when there is one, these signals no longer end this process by themselves.
#[derive(Debug)]
pub(super) struct Signals {
    interrupts: Signal,
    terminations: Signal,
    /// How the command ends by the last one.
    seen: Option<Ending>,
}

/// Ctrl-C, from now on: it stops cells instead of this process.
pub(super) fn interrupts() -> Result<Signal, Failure> {
    listen(SignalKind::interrupt(), "Ctrl-C")
}

fn listen(kind: SignalKind, name: &str) -> Result<Signal, Failure> {
    signal(kind).map_err(|e| Failure::Failed(format!("listening for {name}: {e}")))
}

impl Signals {
    /// Listens from now on.
    pub(super) fn listen() -> Result<Self, Failure> {
        let terminations = listen(SignalKind::terminate(), "SIGTERM")?;
        Ok(Self { interrupts: interrupts()?, terminations, seen: None })
    }

    /// Waits for the next one, and says how the command ends by it.
    pub(super) async fn next(&mut self) -> Ending {
        let ending = tokio::select! {
            _ = self.interrupts.recv() => Ending::Interrupted,
            _ = self.terminations.recv() => Ending::Terminated,
        };
        self.seen = Some(ending);
        ending
    }

    /// How the command ends by the last one, if there was one.
    pub(super) fn seen(&self) -> Option<Ending> {
        self.seen
    }

    /// The session that is being opened, unless a signal wants the command to end: then there is none.
    pub(super) async fn open(
        &mut self,
        opening: impl Future<Output = Result<Box<dyn Environment>, Failure>>,
    ) -> Result<ControlFlow<Ending, Box<dyn Environment>>, Failure> {
        let mut opening = std::pin::pin!(opening);
        let ending = tokio::select! {
            biased;
            opened = &mut opening => return opened.map(ControlFlow::Continue),
            ending = self.next() => ending,
        };
        if let Ok(Ok(environment)) = tokio::time::timeout(OPENING_TIME, opening).await {
            environment.close().await?;
        }
        Ok(ControlFlow::Break(ending))
    }
}
