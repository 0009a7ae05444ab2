//! The processes of sandboxes, found through `/proc` by a mark in their environment.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// The variable that marks a sandbox's processes.
pub(crate) const MARK: &str = "KAA_STAND_IN_SANDBOX";
const PAGE_BYTES: u64 = 4096;

/// A process that isn't a zombie.
struct Proc {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    rss_bytes: u64,
    environ: Vec<u8>,
    network: Option<PathBuf>,
}

/// The processes of this machine at one time.
pub(crate) struct Procs(Vec<Proc>);

impl Procs {
    pub(crate) fn now() -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        Self(entries.filter_map(|entry| read(entry.file_name().to_str()?.parse().ok()?)).collect())
    }

    /// Those with this mark or in this network, with all that descend from them or share their groups,
    /// and the memory they have in all.
    pub(crate) fn of(&self, mark: &str, network: Option<&PathBuf>) -> (Vec<i32>, u64) {
        let entry = format!("{MARK}={mark}");
        let is_marked = |process: &&Proc| {
            process.environ.split(|byte| *byte == 0).any(|found| found == entry.as_bytes())
                || network.is_some() && process.network.as_ref() == network
        };
        let mut found: HashSet<i32> = self.0.iter().filter(is_marked).map(|p| p.pid).collect();
        loop {
            let before = found.len();
            let belongs = |process: &&Proc| {
                [process.parent, process.group, process.session].iter().any(|id| found.contains(id))
            };
            let more: Vec<i32> = self.0.iter().filter(belongs).map(|p| p.pid).collect();
            found.extend(more);
            if found.len() == before {
                break;
            }
        }
        let rss = self.0.iter().filter(|p| found.contains(&p.pid)).map(|p| p.rss_bytes).sum();
        (found.into_iter().collect(), rss)
    }
}

fn read(pid: i32) -> Option<Proc> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before, in parentheses, may have anything in it.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    let number = |at: usize| fields.get(at)?.parse::<i64>().ok();
    let id = |at| i32::try_from(number(at)?).ok();
    Some(Proc {
        pid,
        parent: id(1)?,
        group: id(2)?,
        session: id(3)?,
        rss_bytes: u64::try_from(number(21)?).ok()? * PAGE_BYTES,
        environ: fs::read(format!("/proc/{pid}/environ")).unwrap_or_default(),
        network: network_of(pid),
    })
}

/// What tells the network namespaces of processes from each other.
pub(crate) fn network_of(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

/// Kills all of them, and those that they start meanwhile.
pub(crate) fn kill_all(mark: &str, network: Option<&PathBuf>) {
    // What is killed takes a moment to go; a machine on which it takes 10 s has other problems.
    for _ in 0..1000 {
        let (pids, _) = Procs::now().of(mark, network);
        if pids.is_empty() {
            return;
        }
        // Stopped first: all of a container ends at once, and none of it tells of another's end.
        for signal in [Signal::STOP, Signal::KILL] {
            for pid in pids.iter().copied().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, signal);
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Kills the group that a process leads.
pub(crate) fn kill_group(leader: u32) {
    if let Some(group) = i32::try_from(leader).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}
