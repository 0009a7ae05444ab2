//! Why a container ended, from what the engine and the container itself said about it.

use super::fault::{Fault, said};
use crate::error::Error;

/// What a process ends with that was killed with `SIGKILL`.
const KILLED: i64 = 137;

/// What a verdict is about.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    pub(super) host: String,
    pub(super) image: String,
    pub(super) python: String,
    pub(super) memory_bytes: u64,
}

/// What the engine knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Evidence {
    /// Whether the engine remembers the container at all.
    pub(super) is_known: bool,
    /// Whether the kernel killed some process of it for memory.
    pub(super) has_oom: bool,
    /// The signal that somebody had the engine send.
    pub(super) signal: Option<String>,
    /// What its main process ended with.
    pub(super) exit_code: Option<i64>,
    /// Whether it's still there and runs.
    pub(super) is_running: bool,
}

/// What the container said.
#[derive(Debug, Clone, Copy)]
pub(super) struct Said<'a> {
    pub(super) has_stdout: bool,
    pub(super) stderr: &'a str,
}

impl Subject {
    /// Why `python` could not be started in the image, or stopped before it said anything.
    pub(super) fn no_python(&self, found: String) -> Error {
        Error::Incompatible {
            what: format!("the image `{}`", self.image),
            expected: format!(
                "Python 3.9 or newer at `{}` (name another image or interpreter)",
                self.python
            ),
            found,
        }
    }

    /// Why a container could not be made or started.
    pub(super) fn not_started(&self, fault: Fault) -> Error {
        let Fault::Refused { status, message } = fault else { return fault.of_engine(&self.host) };
        let lower = message.to_lowercase();
        // The runtimes word it differently; all of them name what they could not execute.
        let is_python = lower.contains("executable file not found")
            || (lower.contains("exec") && lower.contains(&self.python.to_lowercase()));
        if is_python {
            return self.no_python(message);
        }
        if status == 404 && lower.contains("no such image") {
            let reason = format!("it was removed from the Docker engine at {}", self.host);
            return Error::unavailable(format!("the image `{}`", self.image), reason);
        }
        let what = format!("a container of `{}`", self.image);
        Error::unavailable(what, format!("the Docker engine at {} refused: {message}", self.host))
    }

    /// Why a container ended that should not have.
    pub(super) fn verdict(&self, evidence: Result<Evidence, Fault>, seen: Said<'_>) -> Error {
        let evidence = match evidence {
            Ok(evidence) => evidence,
            Err(fault) => {
                return Error::Poisoned {
                    reason: format!(
                        "the Docker engine at {} went away while the session was open ({}); start it \
                         again",
                        self.host,
                        fault.reason()
                    ),
                };
            }
        };
        let poisoned = |reason: String| Error::Poisoned { reason };
        let stderr = said(tail(seen.stderr));
        match evidence.exit_code {
            Some(KILLED) if evidence.has_oom => poisoned(format!(
                "the container was out of memory and the kernel ended its main process; raise \
                 limits.memory_bytes, which is {}",
                self.memory_bytes
            )),
            Some(_) if evidence.signal.is_some() => poisoned(format!(
                "somebody stopped the container with signal {}: not this session",
                evidence.signal.unwrap_or_default()
            )),
            Some(KILLED) => poisoned(format!(
                "the container's main process was killed from outside; look whether \
                 limits.memory_bytes, which is {}, is too small for it, or the machine of the engine \
                 out of memory",
                self.memory_bytes
            )),
            Some(code) if !seen.has_stdout => {
                let found = if stderr.is_empty() { "it said nothing".to_owned() } else { stderr };
                self.no_python(format!("exit code {code}: {found}"))
            }
            Some(code) if stderr.is_empty() => {
                poisoned(format!("the container's main process ended with exit code {code}"))
            }
            Some(code) => poisoned(format!(
                "the container's main process ended with exit code {code}: {stderr}"
            )),
            None if evidence.is_running => poisoned(format!(
                "the connection to the container broke; look at what is between here and {}",
                self.host
            )),
            None if evidence.is_known => {
                poisoned("the container is gone; somebody removed it".into())
            }
            None => poisoned(format!(
                "the Docker engine at {} was restarted and the container did not outlive that",
                self.host
            )),
        }
    }
}

/// The last lines, where a traceback says what it is about.
fn tail(text: &str) -> &str {
    const BYTES_MAX: usize = 500;
    let text = text.trim();
    let mut at = text.len().saturating_sub(BYTES_MAX);
    while !text.is_char_boundary(at) {
        at += 1;
    }
    &text[at..]
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use super::*;

    fn subject() -> Subject {
        Subject {
            host: "unix:///run/d.sock".into(),
            image: "demo".into(),
            python: "python3".into(),
            memory_bytes: 1 << 28,
        }
    }

    #[test]
    fn every_end_has_a_reason_of_its_own() {
        let known = Evidence { is_known: true, ..Evidence::default() };
        let died = |code| Evidence { exit_code: Some(code), ..known.clone() };
        let silent = Said { has_stdout: false, stderr: "" };
        let spoke = Said { has_stdout: true, stderr: "" };
        let cried = |has_stdout| Said { has_stdout, stderr: "Traceback\nSyntaxError: bad\n" };
        let cases: Vec<(Result<Evidence, Fault>, Said<'_>, bool, &str)> = vec![
            (Ok(Evidence { has_oom: true, ..died(137) }), spoke, true, "which is 268435456"),
            (Ok(Evidence { has_oom: true, ..died(137) }), silent, true, "out of memory and"),
            (Ok(Evidence { has_oom: true, ..died(3) }), spoke, true, "ended with exit code 3"),
            (Ok(Evidence { signal: Some("9".into()), ..died(137) }), spoke, true, "signal 9"),
            (Ok(died(137)), spoke, true, "killed from outside"),
            (Ok(died(1)), cried(true), true, "exit code 1: Traceback SyntaxError: bad"),
            (Ok(died(1)), cried(false), false, "found exit code 1: Traceback SyntaxError: bad"),
            (Ok(died(0)), silent, false, "exit code 0: it said nothing"),
            (Ok(Evidence { is_running: true, ..known.clone() }), spoke, true, "connection"),
            (Ok(known), spoke, true, "somebody removed it"),
            (Ok(Evidence::default()), spoke, true, "was restarted"),
            (Err(Fault::Unreachable(io::ErrorKind::ConnectionRefused)), spoke, true, "went away"),
            (Err(Fault::Silent(Duration::from_secs(3))), spoke, true, "within 3 s"),
        ];
        let mut reasons = Vec::new();
        for (evidence, seen, poisons, part) in cases {
            let error = subject().verdict(evidence, seen);
            let text = error.to_string();
            assert!(text.contains(part), "{part}: {text}");
            assert_eq!(error.poisons(), poisons, "{text}");
            reasons.push(text);
        }
        reasons.dedup();
        assert!(reasons.len() >= 12, "{reasons:#?}");
    }

    #[test]
    fn a_start_that_is_refused_says_what_of_it() {
        for (status, message, part) in [
            (400, r#"exec: "python3": executable file not found in $PATH: unknown"#, "Python 3.9"),
            (500, "starting container process caused: exec python3: permission denied", "at `pyth"),
            (404, "No such image: sha256:1234", "it was removed from"),
            (400, "invalid mount config for type \"bind\"", "refused: invalid mount"),
        ] {
            let error = subject().not_started(Fault::Refused { status, message: message.into() });
            assert!(error.to_string().contains(part), "{error}");
        }
        let error = subject().not_started(Fault::Unreachable(io::ErrorKind::NotFound));
        assert!(error.to_string().contains("no such socket"), "{error}");
    }

    #[test]
    fn the_tail_is_cut_between_characters() {
        let text = "é".repeat(400);
        assert_eq!(tail(&text).chars().count(), 250);
        assert_eq!(tail(" x\n"), "x");
    }
}
