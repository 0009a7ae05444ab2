//! Whose container or sandbox it is, so that what a dead process left can be told from what a living one
//! uses.

use std::fmt;
use std::fs;

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

impl Owner {
    /// `None` on a system that doesn't tell (without `/proc`): there containers end with the connection
    /// all the same, and only what a killed engine left stays.
    pub(crate) fn of_this_process() -> Option<Self> {
        let pid = std::process::id();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = fs::read_link("/proc/self/ns/pid").ok()?;
        let namespace: String = namespace.to_str()?.chars().filter(char::is_ascii_digit).collect();
        let realm = format!("{}:{namespace}", boot.trim());
        Some(Self { realm, pid, started: started(pid)? })
    }

    /// Whether the process with this label is of this realm and dead. `started` tells when the process
    /// of a number was started, if there is one.
    #[cfg(feature = "docker")]
    pub(crate) fn outlived(&self, label: &str, started: impl Fn(u32) -> Option<u64>) -> bool {
        match Self::parse(label) {
            Some(other) => other.realm == self.realm && started(other.pid) != Some(other.started),
            None => false,
        }
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

    /// Whether the process with this tag lives, if it's of this realm.
    #[cfg(feature = "modal")]
    pub(crate) fn knows_alive(&self, tag: &str) -> Option<bool> {
        let (rest, since) = tag.rsplit_once('-')?;
        let (realm, pid) = rest.rsplit_once('-')?;
        let (pid, since) = (pid.parse().ok()?, since.parse::<u64>().ok()?);
        (realm == self.realm_tag()).then(|| started(pid) == Some(since))
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

/// When the process of this number was started; `None` when there is none that still runs.
pub(crate) fn started(pid: u32) -> Option<u64> {
    started_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields are counted from behind the name, which may have anything in it.
fn started_in(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // What only waits for its parent has no connection any more.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_process_of_this_realm_left_is_a_leftover() {
        let me = Owner { realm: "boot:4026".into(), pid: 7, started: 100 };
        let alive = |pid| match pid {
            7 => Some(100),
            8 => Some(250),
            _ => None,
        };
        for (label, is_leftover) in [
            ("boot:4026/7/100", false),
            ("boot:4026/8/250", false),
            ("boot:4026/8/249", true),
            ("boot:4026/9/100", true),
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
        assert_eq!(started_in(&format!("7 (a) Z (b)) S {tail}")), Some(4711));
        assert_eq!(started_in(&format!("7 (name) Z {tail}")), None);
        for odd in ["", "7 (name) S 1 2", "7 name S", ") "] {
            assert_eq!(started_in(odd), None, "{odd}");
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
