//! What the process holds at one moment, as procfs tells it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What is looked at: its name, its unit, and how much more of it there may be at the end.
///
/// The bounds are of quiet moments, in which every session but one is gone. What is counted exactly is
/// bounded tightly; the rest hangs on what the last sessions were, and on how the allocator's free
/// lists lie.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    /// By how much figures are divided to be shown.
    pub(crate) unit: u64,
    /// What may be more at the end than after the warm-up.
    pub(crate) slack: u64,
}

pub(crate) const METRICS: [Metric; 11] = [
    // What was allocated and not given back. A page per session would be some 30 MB in two minutes.
    Metric { name: "heap KB", unit: 1 << 10, slack: 128 << 10 },
    // Without what is mapped from files: the allocator's arenas, which keep most of what was ever in
    // use at once (160 MB), stacks, and pages of images that sessions wrote.
    Metric { name: "anonymous MB", unit: 1 << 20, slack: 96 << 20 },
    // Clean pages of images and of code included, which the system takes back when it likes. A slot
    // has them all only when all kinds of cells have run in it.
    Metric { name: "resident MB", unit: 1 << 20, slack: 256 << 20 },
    // Files in memory, whether they're mapped or only open.
    Metric { name: "memfd MB", unit: 1 << 20, slack: 4 << 20 },
    Metric { name: "descriptors", unit: 1, slack: 2 },
    Metric { name: "threads", unit: 1, slack: 0 },
    Metric { name: "mappings", unit: 1, slack: 64 },
    // Address space: what is reserved and never touched shows nowhere else.
    Metric { name: "address space GB", unit: 1 << 30, slack: 24 << 30 },
    Metric { name: "children", unit: 1, slack: 0 },
    Metric { name: "files in the store", unit: 1, slack: 8 },
    Metric { name: "files in TMPDIR", unit: 1, slack: 0 },
];

/// The figures of all [`METRICS`] at one moment.
pub(crate) type Sample = [u64; METRICS.len()];

/// The process as it is now; `None` where there is no procfs.
pub(crate) fn sample(scratch: &Path) -> Option<Sample> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let (mut descriptors, mut memfd_bytes) = (0, 0);
    let mut store_files = 0;
    for entry in fs::read_dir("/proc/self/fd").ok()?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        descriptors += 1;
        if target.as_os_str().as_encoded_bytes().starts_with(b"/memfd:") {
            memfd_bytes += fs::metadata(entry.path()).map_or(0, |file| file.blocks() * 512);
        }
        // The process's own directory is locked, and so open.
        if target.parent() == Some(scratch) {
            store_files = files_below(&target);
        }
    }
    Some([
        crate::HEAP.current_usage() as u64,
        field("RssAnon:")? << 10,
        field("VmRSS:")? << 10,
        memfd_bytes,
        descriptors,
        field("Threads:")?,
        fs::read_to_string("/proc/self/maps").ok()?.lines().count() as u64,
        field("VmSize:")? << 10,
        children(),
        store_files,
        files_below(&std::env::temp_dir()),
    ])
}

/// Files and directories below a directory.
fn files_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let below = |path: &Path| if path.is_dir() { files_below(path) } else { 0 };
    entries.flatten().map(|entry| 1 + below(&entry.path())).sum()
}

/// Processes that this one started, dead ones that nobody has waited for included.
fn children() -> u64 {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    let own = std::process::id().to_string();
    let is_child = |entry: &fs::DirEntry| {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name before it may have anything in it.
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        rest.split(' ').nth(1) == Some(&own)
    };
    entries.flatten().filter(is_child).count() as u64
}

/// One line of a table.
pub(crate) fn row(label: &str, sample: &Sample) -> String {
    let cells = sample.iter().zip(&METRICS).map(|(value, metric)| {
        let shown = *value as f64 / metric.unit as f64;
        let digits = usize::from(metric.unit > 1 << 10);
        format!("{shown:>width$.digits$}", width = metric.name.len().max(8))
    });
    format!("{label:<18} {}", cells.collect::<Vec<_>>().join("  "))
}

/// The line above them.
pub(crate) fn header() -> String {
    let names: Vec<String> = METRICS.iter().map(|metric| format!("{:>8}", metric.name)).collect();
    format!("{:<18} {}", "", names.join("  "))
}
