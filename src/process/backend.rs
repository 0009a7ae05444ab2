//! A machine as a source of sessions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Machine;
use super::environment::ProcessEnvironment;
use super::guest::Compiled;
use crate::environment::{Capabilities, Environment, EnvironmentOptions};
use crate::error::Result;
use crate::snapshot::Snapshot;

/// What the sessions of a backend share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) machine: Box<dyn Machine>,
    pub(super) compiled: Compiled,
    /// A cell that every session begins with.
    pub(super) setup_code: Option<String>,
    /// Whether a session was seen that can save its variables.
    pub(super) dill: AtomicBool,
}

impl Shared {
    pub(super) fn capabilities(&self) -> Capabilities {
        Capabilities { snapshot: self.dill.load(Ordering::Relaxed), ..self.machine.capabilities() }
    }
}

/// Sessions on a machine: what the backends of processes are made of.
#[derive(Debug, Clone)]
pub(crate) struct ProcessBackend {
    shared: Arc<Shared>,
}

impl ProcessBackend {
    /// Sessions of `machine`, which run `setup_code` before anything else.
    pub(crate) fn new(machine: impl Machine, setup_code: Option<String>) -> Self {
        let dill = AtomicBool::new(false);
        let compiled = Compiled::default();
        Self { shared: Arc::new(Shared { machine: Box::new(machine), compiled, setup_code, dill }) }
    }

    /// As [`Backend::capabilities`](crate::Backend::capabilities). Whether there are snapshots isn't
    /// known before the first session was opened.
    pub(crate) fn capabilities(&self) -> Capabilities {
        self.shared.capabilities()
    }

    /// As [`Backend::open`](crate::Backend::open).
    ///
    /// # Errors
    ///
    /// As there.
    pub(crate) async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        Ok(Box::new(ProcessEnvironment::open(&self.shared, options).await?))
    }

    /// A snapshot from a file.
    ///
    /// # Errors
    ///
    /// As [`super::saved::load`].
    pub(crate) fn load_snapshot(&self, path: &std::path::Path) -> Result<Snapshot> {
        super::saved::load(self.shared.machine.capabilities().backend, path).map(Snapshot::new)
    }
}
