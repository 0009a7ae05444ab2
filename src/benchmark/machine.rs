//! The machine that figures are of.

use std::fs;

use serde::{Deserialize, Serialize};

/// What the machine is, as far as it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Machine {
    /// Processors that this process may use.
    pub cpus: usize,
    /// What kind they are.
    pub cpu: Option<String>,
    /// Whether a hypervisor is below it.
    pub is_virtual: Option<bool>,
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// The operating system.
    pub system: String,
    /// Its kernel.
    pub kernel: Option<String>,
    /// Processes that were running or waiting for a processor when the run began, by its load average of
    /// one minute, in hundredths: other work disturbs the figures.
    pub load_percent: Option<u32>,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let of_cpu = |key: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
            line.split_once(':').map(|(_, value)| value.trim().to_owned())
        };
        let release = read("/etc/os-release").unwrap_or_default();
        let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        let load = read("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok());
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: of_cpu("model name"),
            is_virtual: of_cpu("flags").map(|flags| flags.split(' ').any(|f| f == "hypervisor")),
            memory_bytes: meminfo("MemTotal"),
            system: name.map_or(std::env::consts::OS.into(), |name| name.trim_matches('"').into()),
            kernel: read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()),
            load_percent: load.map(|load: f64| (load * 100.0) as u32),
        }
    }

    /// What else there was to do, if that is known.
    pub(super) fn show_load(&self) -> String {
        let load = self.load_percent.map(|percent| f64::from(percent) / 100.0);
        load.map_or(String::new(), |load| format!("; load average at the beginning: {load:.2}"))
    }

    /// As people read it.
    pub(super) fn show(&self) -> String {
        let mut text = format!("{} × {}", self.cpus, self.cpu.as_deref().unwrap_or("processor"));
        if self.is_virtual == Some(true) {
            text.push_str(" (virtual machine)");
        }
        if let Some(bytes) = self.memory_bytes {
            text.push_str(&format!(", {:.0} GiB", bytes as f64 / f64::from(1 << 30)));
        }
        text.push_str(&format!(", {}", self.system));
        if let Some(kernel) = &self.kernel {
            text.push_str(&format!(", kernel {kernel}"));
        }
        text
    }
}

/// What is held for processes: their own pages, those that they share, and what the kernel needs for them.
const HELD: [&str; 5] = ["AnonPages", "Shmem", "PageTables", "KernelStack", "SUnreclaim"];

/// Bytes of this machine's memory that are held for processes. What is free isn't asked: what has just been
/// given back isn't counted there, while the kernel keeps it at hand for a processor.
pub(super) fn memory_used() -> Option<u64> {
    HELD.iter().map(|key| meminfo(key)).sum()
}

/// An entry of `/proc/meminfo`, in bytes.
fn meminfo(key: &str) -> Option<u64> {
    let text = read("/proc/meminfo")?;
    let line =
        text.lines().find(|line| line.strip_prefix(key).is_some_and(|l| l.starts_with(':')))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}
