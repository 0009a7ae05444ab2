//! Signals that want a command to end: Ctrl-C, SIGTERM, and SIGHUP when its terminal goes.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kaa::Environment;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Ending, Failure, exit_code};

/// How long a signal waits for a session that is being made: half of one can't be closed.
const OPENING_TIME: Duration = Duration::from_secs(15);

/// How long the end of what a dropped opening has made may take.
pub(super) const LEAVING_TIME: Duration = Duration::from_secs(5);
/// Signals that come together are one: a terminal that goes tells everybody, and so does its shell.
const TOGETHER: Duration = Duration::from_secs(1);

/// From when there is one, these signals no longer end this process by themselves.
#[derive(Debug)]
pub(super) struct Signals {
    interrupts: Signal,
    terminations: Signal,
    /// None when the command is to outlive its terminal.
    hangups: Option<Signal>,
    /// How the command ends by the last one.
    seen: Option<Ending>,
}

/// Ctrl-C, from now on: it stops cells instead of this process.
pub(super) fn interrupts() -> Result<Signal, Failure> {
    listen(SignalKind::interrupt(), "Ctrl-C")
}

/// Waits for a signal that may be none.
async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether `nohup` or the like started this process, as its status in `/proc` says.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    // What can't be read is left as it is. SIGHUP has the number 1, and the lowest bit.
    mask.is_none_or(|mask| mask & 1 != 0)
}

/// A signal after the first one ends the process at once, whatever it's doing: writing to somebody who
/// doesn't read, waiting for a session that takes its time. What that leaves, Kaa's next session ends.
fn insist() {
    let listening = async {
        let (interrupts, terminations) =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
        let (Ok(interrupts), Ok(terminations)) = (interrupts, terminations) else { return };
        let mut signals = Signals { interrupts, terminations, hangups: None, seen: None };
        signals.next().await;
        let first = Instant::now();
        loop {
            let ending = signals.next().await;
            if first.elapsed() > TOGETHER {
                std::process::exit(exit_code(&Ok(ending)).into());
            }
        }
    };
    // A thread of its own: that of the command may be in a system call. Without one, signals are heard when
    // the command gets to it.
    drop(std::thread::Builder::new().name("signals".into()).spawn(|| {
        let reactor = tokio::runtime::Builder::new_current_thread().enable_all().build();
        if let Ok(reactor) = reactor {
            reactor.block_on(listening);
        }
    }));
}

fn listen(kind: SignalKind, name: &str) -> Result<Signal, Failure> {
    signal(kind).map_err(|e| Failure::Failed(format!("listening for {name}: {e}")))
}

impl Signals {
    /// Listens from now on.
    pub(super) fn listen() -> Result<Self, Failure> {
        let terminations = listen(SignalKind::terminate(), "SIGTERM")?;
        let hangups = match std::fs::read_to_string("/proc/self/status") {
            Ok(status) if !ignores_hangup(&status) => Some(listen(SignalKind::hangup(), "SIGHUP")?),
            _ => None,
        };
        insist();
        Ok(Self { interrupts: interrupts()?, terminations, hangups, seen: None })
    }

    /// Waits for the next one, and says how the command ends by it.
    pub(super) async fn next(&mut self) -> Ending {
        let ending = tokio::select! {
            _ = self.interrupts.recv() => Ending::Interrupted,
            _ = self.terminations.recv() => Ending::Terminated,
            () = received(&mut self.hangups) => Ending::Terminated,
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
        match tokio::time::timeout(OPENING_TIME, opening).await {
            Ok(Ok(environment)) => environment.close().await?,
            Ok(Err(_)) => {}
            // What it had made ends in tasks of its own, which end with this process.
            Err(_) => tokio::time::sleep(LEAVING_TIME).await,
        }
        Ok(ControlFlow::Break(ending))
    }
}

#[cfg(test)]
mod tests {
    use super::ignores_hangup;

    #[test]
    fn a_process_that_is_to_outlive_its_terminal_is_known() {
        for (status, ignores) in [
            ("SigBlk:\t0000000000000000\nSigIgn:\t0000000000001000\nSigCgt:\t1", false),
            ("SigIgn:\t0000000000001001\n", true),
            ("SigIgn:\tx\n", true),
            ("SigBlk:\t0000000000000000\n", true),
        ] {
            assert_eq!(ignores_hangup(status), ignores, "{status}");
        }
    }
}
