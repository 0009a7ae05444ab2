//! Who is measured: the backends, each as it is without flags, and the ways of metering.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use kaa::benchmark::{InProcess, Role, Sessions, Suite, Workload};
use kaa::{Backend, Limits, LocalBackend, Metering, Runtime, WasmBackend};

use super::{IsolationFlags, Wanted};
use crate::cli::backend::local_options;
use crate::cli::console::Console;
use crate::cli::docker::{self, DockerFlags};
use crate::cli::progress::Display;
use crate::cli::{Failure, modal, session};

/// What the image of the set that computes has to have, which is numpy.
const CPU_IMAGE: &str = "sci";
const IMAGE: &str = "base";
/// gVisor, as engines know it.
const GVISOR: &str = "runsc";
const COLD_CELL: [&str; 3] = ["--quiet", "-c", "print(1+1)"];
const WITHOUT: &str = "this program was built without it";
const COSTS: &str = "not asked for: it costs money; name it in --backends";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Column {
    /// CPython's own exec in one process that goes on living: the floor
    InProcess,
    /// Processes of yours
    Local,
    /// WebAssembly, inside this process
    Wasm,
    /// Containers of a Docker engine
    Docker,
    /// The same under gVisor
    #[value(name = "docker+gvisor")]
    DockerGvisor,
    /// Sandboxes in Modal's cloud, at the cost of your account there
    Modal,
}

/// With which versions this program was built.
const LOCK: &str = include_str!("../../../Cargo.lock");

/// What columns are made with.
struct Maker<'a> {
    flags: IsolationFlags,
    console: Console,
    display: Display,
    reactor: &'a tokio::runtime::Runtime,
    /// This program.
    kaa: PathBuf,
}

/// Who is measured at what. Sets up what is missing, and shows it.
pub(super) fn suite(
    flags: IsolationFlags,
    wanted: &Wanted,
    console: Console,
    reactor: &tokio::runtime::Runtime,
) -> Result<Suite, Failure> {
    let kaa = std::env::current_exe();
    let kaa = kaa.map_err(|e| Failure::Failed(format!("finding this program: {e}")))?;
    let mut columns = flags.backends.clone();
    let modal_is_named = columns.contains(&Column::Modal);
    if columns.is_empty() {
        columns = Column::value_variants().to_vec();
    }
    let laps = flags.laps;
    let display = Display::new(console);
    let maker = Maker { flags, console, display, reactor, kaa };
    maker.check(&columns)?;
    let mut suite = Suite::default().workloads(wanted.workloads.iter().copied()).laps(laps);
    let mut seen = Vec::new();
    for column in columns.into_iter().filter(|_| !wanted.workloads.is_empty()) {
        if seen.contains(&column) {
            continue;
        }
        seen.push(column);
        let name = column.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
        let made = match column {
            Column::InProcess => {
                suite = suite.subject(InProcess::new(maker.local().python));
                continue;
            }
            Column::Local => maker.local_sessions(&name),
            Column::Wasm => maker.wasm(&name, &wanted.workloads),
            Column::Docker => maker.docker(&name, None),
            // An engine that doesn't know gVisor is no mistake of who typed the command.
            Column::DockerGvisor => {
                maker.docker(&name, Some(GVISOR)).map_err(|error| match error {
                    Failure::Usage(reason) => Failure::Failed(reason),
                    other => other,
                })
            }
            Column::Modal if modal_is_named => maker.modal(&name),
            Column::Modal => Err(Failure::Failed(COSTS.into())),
        };
        suite = match made {
            Ok(sessions) => suite.subject(sessions),
            // What isn't there has a row with its reason. What was typed wrong has none.
            Err(Failure::Failed(reason)) => suite.absent(Role::Isolation, &name, &reason),
            Err(other) => return Err(other),
        };
    }
    if wanted.metering {
        for (name, metering) in [
            ("no metering", Metering::Off),
            ("Kaa's fuel", Metering::Kaa),
            ("wasmtime's epochs", Metering::WasmtimeEpochs),
            ("wasmtime's fuel", Metering::WasmtimeFuel),
        ] {
            suite = match maker.metering(name, metering) {
                Ok(sessions) => suite.metering(sessions),
                Err(Failure::Failed(reason)) => suite.absent(Role::Metering, name, &reason),
                Err(other) => return Err(other),
            };
        }
    }
    Ok(suite)
}

/// The arguments of a process that runs the first cell.
fn cold(more: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(more);
    arguments.extend(COLD_CELL.map(str::to_owned));
    arguments
}

/// The version of wasmtime that this program was built with.
fn wasmtime() -> &'static str {
    let entry = LOCK.split_once("name = \"wasmtime\"\nversion = \"").map(|(_, rest)| rest);
    entry.and_then(|rest| rest.split('"').next()).unwrap_or_default()
}

impl Maker<'_> {
    /// Refuses flags that are wrong, before minutes go into what comes first.
    fn check(&self, columns: &[Column]) -> Result<(), Failure> {
        let flags = &self.flags;
        if columns.iter().any(|c| matches!(c, Column::Docker | Column::DockerGvisor))
            && docker::CAPABILITIES.is_some()
        {
            match flags.docker.clone().resolve(flags.python.clone(), None, None) {
                // That there is no engine is a finding.
                Ok(_) | Err(Failure::Failed(_)) => {}
                Err(wrong) => return Err(wrong),
            }
        }
        Ok(())
    }

    fn local(&self) -> kaa::LocalOptions {
        local_options(self.flags.python.clone(), None)
    }

    fn python_flag(&self) -> Vec<String> {
        let python = self.flags.python.clone();
        python.map_or(Vec::new(), |python| vec!["--python".into(), python])
    }

    fn local_sessions(&self, name: &str) -> Result<Sessions, Failure> {
        let backend = Arc::new(LocalBackend::new(self.local()));
        let arguments =
            ["--backend".to_owned(), "local".into()].into_iter().chain(self.python_flag());
        let what = "a process for each session";
        Ok(Sessions::new(name, what, backend).cold(&self.kaa, cold(arguments)))
    }

    fn sessions_of(
        &self,
        runtime: &Arc<Runtime>,
        image: &str,
    ) -> Result<Arc<dyn Backend>, Failure> {
        let image = runtime.image(image, &|report| self.display.show(report))?;
        Ok(Arc::new(WasmBackend::new(Arc::clone(runtime), image)))
    }

    fn wasm(&self, name: &str, workloads: &[Workload]) -> Result<Sessions, Failure> {
        let runtime = Arc::new(Runtime::open(session::store()?)?);
        let cells = self.sessions_of(&runtime, IMAGE)?;
        let what = format!("WebAssembly in the process of the host, wasmtime {}", wasmtime());
        let sessions = Sessions::new(name, what, cells).cold(&self.kaa, cold([]));
        // Making that image takes a minute.
        if workloads.iter().any(|workload| matches!(workload, Workload::Cpu(_))) {
            return Ok(sessions.cpu(self.sessions_of(&runtime, CPU_IMAGE)?));
        }
        Ok(sessions)
    }

    fn docker(&self, name: &str, runtime: Option<&str>) -> Result<Sessions, Failure> {
        if docker::CAPABILITIES.is_none() {
            return Err(Failure::Failed(WITHOUT.into()));
        }
        let mut flags: DockerFlags = self.flags.docker.clone();
        if let Some(runtime) = runtime {
            flags.set_runtime(runtime);
        }
        let plan = flags.resolve(self.flags.python.clone(), None, None)?;
        let arguments = ["--backend".to_owned(), "docker".into()].into_iter();
        let arguments = arguments.chain(self.python_flag()).chain(plan.arguments());
        let progress = |report| self.display.show(report);
        let connecting = plan.connect(&progress);
        let processes = self.reactor.block_on(connecting)?;
        let engine = self.reactor.block_on(plan.engine())?;
        let what = format!("{}, {engine}", processes.what);
        let sessions = Sessions::new(name, what, processes.backend);
        let sessions = if plan.is_here() { sessions } else { sessions.elsewhere() };
        Ok(sessions.cold(&self.kaa, cold(arguments)))
    }

    fn modal(&self, name: &str) -> Result<Sessions, Failure> {
        if modal::CAPABILITIES.is_none() {
            return Err(Failure::Failed(WITHOUT.into()));
        }
        let plan = self.flags.modal.clone().resolve(self.flags.python.clone(), None, None)?;
        let progress = |report| self.display.show(report);
        let connecting = plan.connect(&progress);
        let processes = self.reactor.block_on(connecting)?;
        Ok(Sessions::new(name, processes.what, processes.backend).elsewhere())
    }

    fn metering(&self, name: &str, metering: Metering) -> Result<Sessions, Failure> {
        if metering != Metering::Kaa {
            self.console.note(&format!("the guest with {name}, to be compared with"));
        }
        let runtime = Arc::new(Runtime::with_metering(session::store()?, metering)?);
        let backend = self.sessions_of(&runtime, CPU_IMAGE)?;
        // What isn't metered can't be limited.
        Ok(Sessions::new(name, "WebAssembly", backend).limits(Limits::unlimited()))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_of_wasmtime_is_known() {
        assert!(super::wasmtime().starts_with("48."), "{}", super::wasmtime());
    }
}
