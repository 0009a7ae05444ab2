//! What the process holds at rest, and whether it has become more.

use std::time::{Duration, Instant};

/// The process is at rest within this, or something goes on that shouldn't.
const REST_MAX: Duration = Duration::from_secs(30);
/// So many looks in a row that see the same are rest. Idle threads end within one of them.
const LOOKS: u32 = 10;
const BETWEEN_LOOKS: Duration = Duration::from_millis(4);

/// What is looked at. Where there is no procfs only the heap is known.
struct Figure {
    name: &'static str,
    read: fn() -> u64,
    /// What there may be more of after [`crate::REPETITIONS`] repetitions.
    growth_max: u64,
    /// Whether it's the same whenever the process is at rest.
    is_exact: bool,
}

const FIGURES: &[Figure] = &[
    // 40 for each repetition. Some hundreds in all come and go: names of directories that are made ahead by
    // the handful and taken one by one.
    Figure {
        name: "heap bytes",
        read: || crate::HEAP.current_usage() as u64,
        growth_max: 40 * crate::REPETITIONS,
        is_exact: true,
    },
    Figure {
        name: "descriptors",
        read: || entries("/proc/self/fd"),
        growth_max: 0,
        is_exact: true,
    },
    Figure { name: "threads", read: || entries("/proc/self/task"), growth_max: 0, is_exact: true },
    // The allocator has some of its own.
    Figure {
        name: "mappings",
        read: || {
            std::fs::read_to_string("/proc/self/maps").map_or(0, |text| text.lines().count() as u64)
        },
        growth_max: 15,
        is_exact: false,
    },
    // A fiber's stack for each repetition would be more.
    Figure {
        name: "address space",
        read: || bytes("/proc/self/status", "VmSize:"),
        growth_max: 256 << 20,
        is_exact: false,
    },
    // Pages of the allocator, and of images that sessions wrote: they stay in slots.
    Figure {
        name: "private memory",
        read: || bytes("/proc/self/smaps_rollup", "Private_Dirty:"),
        growth_max: 16 << 20,
        is_exact: false,
    },
];

fn entries(directory: &str) -> u64 {
    std::fs::read_dir(directory).map_or(0, Iterator::count) as u64
}

/// A line of a file of procfs.
fn bytes(path: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes =
        line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// All [`FIGURES`] when nothing goes on: slots, files and threads are given back in the background.
pub(crate) async fn at_rest() -> Vec<u64> {
    let started = Instant::now();
    let mut exact = [None; FIGURES.len()];
    let mut same = 0;
    while same < LOOKS {
        assert!(started.elapsed() < REST_MAX, "not at rest: {exact:?}");
        tokio::time::sleep(BETWEEN_LOOKS).await;
        same += 1;
        for (last, figure) in exact.iter_mut().zip(FIGURES).filter(|(_, figure)| figure.is_exact) {
            let now = Some((figure.read)());
            if *last != now {
                (*last, same) = (now, 0);
            }
        }
    }
    FIGURES.iter().map(|figure| (figure.read)()).collect()
}

/// What there is more of, in words, and still is when patience has ended.
pub(crate) async fn growth(before: &[u64], patience: Duration) -> Vec<String> {
    let started = Instant::now();
    loop {
        let after = at_rest().await;
        let mut grown = Vec::new();
        for ((figure, before), after) in FIGURES.iter().zip(before).zip(after) {
            let growth = after.saturating_sub(*before);
            if growth > figure.growth_max {
                let Figure { name, growth_max, .. } = figure;
                grown.push(format!("{name}: {growth} more, and {growth_max} are allowed"));
            }
        }
        if grown.is_empty() || started.elapsed() > patience {
            return grown;
        }
    }
}
