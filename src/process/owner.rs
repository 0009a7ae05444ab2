//! Whose container or sandbox it is, so that what a dead process left can be told from what a living one
//! uses.

use std::fmt;
use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
#[cfg(feature = "modal")]
use sha2::{Digest, Sha256};

/// A process, so that no other one is ever taken for it: neither one of another machine or container,
/// nor a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The boot of the machine and the namespace of process numbers.
    realm: String,
    pid: u32,
    /// When it was started, in ticks since the boot.
    started: u64,
}

/// What is known of the process of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trace {
    /// It runs since then, in ticks since the boot.
    Since(u64),
    /// There is none, or none that still runs.
    Dead,
    /// There is one, of which this user isn't told more: `/proc` may be mounted with `hidepid`.
    Hidden,
}

impl Owner {
    /// `None` on a system that doesn't tell (without `/proc`): there containers end with the connection
    /// all the same, and only what a killed engine left stays.
    pub(crate) fn of_this_process() -> Option<Self> {
        let pid = std::process::id();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = fs::read_link("/proc/self/ns/pid").ok()?;
        let namespace: String = namespace.to_str()?.chars().filter(char::is_ascii_digit).collect();
        let realm = format!("{}:{namespace}", boot.trim());
        match started(pid) {
            Trace::Since(started) => Some(Self { realm, pid, started }),
            Trace::Dead | Trace::Hidden => None,
        }
    }

    /// Whether the process with this label is of this realm and dead for sure. `started` tells what is
    /// known of the process of a number.
    #[cfg(feature = "docker")]
    pub(crate) fn outlived(&self, label: &str, started: impl Fn(u32) -> Trace) -> bool {
        Self::parse(label).is_some_and(|other| {
            other.realm == self.realm && started(other.pid).is_alive(other.started) == Some(false)
        })
    }

    /// What others outside of this machine may see of it: letters, digits and dashes.
    #[cfg(feature = "modal")]
    pub(crate) fn tag(&self) -> String {
        format!("{}-{}-{}", self.realm_tag(), self.pid, self.started)
    }

    #[cfg(feature = "modal")]
    fn realm_tag(&self) -> String {
        let digest = Sha256::digest(&self.realm);
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether the process with this tag lives, if it's of this realm and that is known.
    #[cfg(feature = "modal")]
    pub(crate) fn knows_alive(&self, tag: &str) -> Option<bool> {
        let (rest, since) = tag.rsplit_once('-')?;
        let (realm, pid) = rest.rsplit_once('-')?;
        let (pid, since) = (pid.parse().ok()?, since.parse::<u64>().ok()?);
        if realm != self.realm_tag() {
            return None;
        }
        started(pid).is_alive(since)
    }

    #[cfg(feature = "docker")]
    fn parse(label: &str) -> Option<Self> {
        let (rest, since) = label.rsplit_once('/')?;
        let (realm, pid) = rest.rsplit_once('/')?;
        Some(Self { realm: realm.into(), pid: pid.parse().ok()?, started: since.parse().ok()? })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.realm, self.pid, self.started)
    }
}

impl Trace {
    /// Whether it's the process that was started then; nothing when that can't be told.
    fn is_alive(self, started: u64) -> Option<bool> {
        match self {
            Self::Since(since) => Some(since == started),
            Self::Dead => Some(false),
            Self::Hidden => None,
        }
    }
}

/// What is known of the process of this number.
pub(crate) fn started(pid: u32) -> Trace {
    traced(pid, fs::read_to_string(format!("/proc/{pid}/stat")))
}

/// What can't be read says nothing: only the kernel's word that there is none counts.
fn traced(pid: u32, stat: io::Result<String>) -> Trace {
    if let Some(trace) = stat.ok().and_then(|stat| started_in(&stat)) {
        return trace;
    }
    // A number that is too large for one is nobody's.
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    match pid.map(test_kill_process) {
        None | Some(Err(Errno::SRCH)) => Trace::Dead,
        Some(_) => Trace::Hidden,
    }
}

/// Fields are counted from behind the name, which may have anything in it.
fn started_in(stat: &str) -> Option<Trace> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // What only waits for its parent has no connection any more.
    if matches!(fields.next()?, "Z" | "X") {
        return Some(Trace::Dead);
    }
    fields.nth(18)?.parse().ok().map(Trace::Since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_process_of_this_realm_left_is_a_leftover() {
        let me = Owner { realm: "boot:4026".into(), pid: 7, started: 100 };
        let alive = |pid| match pid {
            7 => Trace::Since(100),
            8 => Trace::Since(250),
            9 => Trace::Dead,
            _ => Trace::Hidden,
        };
        for (label, is_leftover) in [
            ("boot:4026/7/100", false),
            ("boot:4026/8/250", false),
            ("boot:4026/8/249", true),
            ("boot:4026/9/100", true),
            ("boot:4026/10/100", false),
            ("other:4026/9/100", false),
            ("boot:4027/9/100", false),
            ("unknown", false),
            ("", false),
            ("boot:4026/nine/100", false),
            ("boot:4026/9/", false),
        ] {
            assert_eq!(me.outlived(label, alive), is_leftover, "{label}");
        }
        assert_eq!(Owner::parse(&me.to_string()), Some(me));
    }

    #[test]
    fn the_start_is_read_whatever_the_name_is() {
        let tail = "1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 10";
        assert_eq!(started_in(&format!("7 (a) Z (b)) S {tail}")), Some(Trace::Since(4711)));
        assert_eq!(started_in(&format!("7 (name) Z {tail}")), Some(Trace::Dead));
        for odd in ["", "7 (name) S 1 2", "7 name S", ") "] {
            assert_eq!(started_in(odd), None, "{odd}");
        }
    }

    #[test]
    fn a_process_that_can_not_be_read_is_dead_only_if_the_kernel_says_so() {
        let hidden = || Err(io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(traced(std::process::id(), hidden()), Trace::Hidden);
        assert_eq!(traced(std::process::id(), Ok("odd".into())), Trace::Hidden);
        // Of another user's, unless this one is root.
        assert_eq!(traced(1, hidden()), Trace::Hidden);
        for nobody in [0, 1 << 30, u32::MAX] {
            assert_eq!(traced(nobody, hidden()), Trace::Dead, "{nobody}");
        }
        for (trace, alive) in [
            (Trace::Since(100), Some(true)),
            (Trace::Since(101), Some(false)),
            (Trace::Dead, Some(false)),
            (Trace::Hidden, None),
        ] {
            assert_eq!(trace.is_alive(100), alive, "{trace:?}");
        }
    }

    #[test]
    fn of_a_tag_is_known_whether_its_process_lives_if_it_is_of_this_realm() {
        let me = Owner { realm: "boot:4026".into(), pid: 1 << 30, started: 100 };
        assert!(me.tag().chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{}", me.tag());
        assert_eq!(me.knows_alive(&me.tag()), Some(false));
        let other = Owner { realm: "boot:4027".into(), ..me.clone() };
        for tag in [other.tag().as_str(), "", "a-b-c", "--"] {
            assert_eq!(me.knows_alive(tag), None, "{tag}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_not_outlived_itself() {
        let me = Owner::of_this_process().unwrap();
        assert!(!me.outlived(&me.to_string(), started));
        assert_eq!(me.knows_alive(&me.tag()), Some(true));
    }
}
