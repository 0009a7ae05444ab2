//! Why a sandbox ended, and what to do about it.

use std::time::Duration;

use super::fault::said;
use super::proto::client::GenericResult;
use super::proto::client::generic_result::GenericStatus;

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ending {
    status: GenericStatus,
    exception: String,
}

/// What a sandbox was made with: the limits that an end may be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) timeout: Duration,
    pub(super) memory_bytes: u64,
}

pub(super) fn of_result(result: &GenericResult) -> Ending {
    // A status of a later Modal is none that says anything here.
    let status = GenericStatus::try_from(result.status).unwrap_or(GenericStatus::Failure);
    Ending { status, exception: said(&result.exception) }
}

impl Ending {
    pub(super) fn is_success(&self) -> bool {
        matches!(self.status, GenericStatus::Success | GenericStatus::Unspecified)
    }

    /// Why it ended, with what helps.
    pub(super) fn words(&self, bounds: Option<Bounds>) -> String {
        let timeout = bounds.map_or_else(String::new, |b| format!(", {:?}", b.timeout));
        let memory = bounds.map_or_else(String::new, |b| format!(", which is {}", b.memory_bytes));
        let words = match self.status {
            GenericStatus::Unspecified => "it still runs".to_owned(),
            GenericStatus::Success => "its first process ended".to_owned(),
            GenericStatus::Failure => "its first process failed".to_owned(),
            GenericStatus::Terminated => {
                "somebody ended the sandbox: Modal's website, `kaa modal clean` or another client; not \
                 this session"
                    .to_owned()
            }
            GenericStatus::Timeout => {
                format!("the sandbox reached its timeout (modal.timeout{timeout}); raise it")
            }
            GenericStatus::IdleTimeout => {
                "the sandbox was idle for longer than Modal allows it".to_owned()
            }
            GenericStatus::InitFailure => {
                "the sandbox could not be started; look whether its image has `sleep` and Python"
                    .to_owned()
            }
            GenericStatus::InternalFailure => {
                "Modal failed while the sandbox ran; a new session may be luckier".to_owned()
            }
            GenericStatus::MemoryManagerEviction | GenericStatus::MemoryThrashingEviction => {
                format!(
                    "Modal evicted the sandbox, because its machine was short of memory; a new session \
                     gets another machine, and a higher limits.memory_bytes{memory} reserves more"
                )
            }
            GenericStatus::KernelOomKill => format!(
                "the sandbox was out of memory and the kernel ended it; raise \
                 limits.memory_bytes{memory}"
            ),
        };
        match self.exception.as_str() {
            "" => words,
            exception => format!("{words} ({exception})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_own_words() {
        let bounds = Bounds { timeout: Duration::from_secs(600), memory_bytes: 1 << 28 };
        let mut seen = std::collections::BTreeSet::new();
        for (status, part) in [
            (GenericStatus::Terminated, "somebody"),
            (GenericStatus::Timeout, "modal.timeout, 600s"),
            (GenericStatus::InitFailure, "could not be started"),
            (GenericStatus::InternalFailure, "Modal failed"),
            (GenericStatus::IdleTimeout, "idle"),
            (GenericStatus::MemoryManagerEviction, "evicted"),
            (GenericStatus::KernelOomKill, "which is 268435456"),
        ] {
            let result = GenericResult { status: status.into(), ..GenericResult::default() };
            let words = of_result(&result).words(Some(bounds));
            assert!(words.contains(part), "{words}");
            assert!(seen.insert(words));
        }
        let unknown = GenericResult { status: 99, exception: "new\nthing".into(), exitcode: 0 };
        assert_eq!(of_result(&unknown).words(None), "its first process failed (new thing)");
    }
}
