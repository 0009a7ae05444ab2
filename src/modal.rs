//! Sessions in sandboxes of Modal.
mod app;
mod channel;
mod client;
mod config;
mod ending;
mod fault;
mod image;
mod machine;
mod options;
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    reason = "generated"
)]
mod proto;
mod retry;
mod router;
mod sandbox;
mod stdin;
mod stdout;
mod until;

use std::path::Path;

use async_trait::async_trait;

pub use self::client::ModalClient;
pub use self::config::ModalConfig;
pub use self::image::ModalImage;
use self::machine::ModalMachine;
pub use self::options::{Carrier, ModalOptions, Network, Secret};
pub use self::router::ProcessExit;
pub use self::sandbox::{Sandbox, SandboxProcess, SandboxReport, SandboxSpec};
use crate::environment::{Backend, Capabilities, Environment, EnvironmentOptions};
use crate::error::Result;
use crate::image::ProgressFn;
use crate::process::ProcessBackend;
use crate::snapshot::Snapshot;

/// The backend's name.
const BACKEND: &str = "modal";
/// What sessions can do of themselves; whether there are snapshots, their Python decides.
const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    isolated: true,
    fuel: false,
    rollback: false,
    snapshot: false,
    deterministic: false,
};
/// What Kaa's own tags begin with.
const TAG_PREFIX: &str = "kaa-";
/// The tags of a session's sandbox: which session, and which process it belongs to.
const SESSION_TAG: &str = "kaa-session";
const OWNER_TAG: &str = "kaa-owner";
/// The version of Modal's Python client whose words these are.
const MIRRORED_PYTHON: &str = "1.6.4";

/// Sessions in sandboxes of Modal.
#[derive(Debug, Clone)]
pub struct ModalBackend(ProcessBackend);

impl ModalBackend {
    /// What sessions in sandboxes can do. Snapshots there are where the image's Python has dill.
    pub const CAPABILITIES: Capabilities = CAPABILITIES;

    /// Finds the app and builds the image.
    ///
    /// # Errors
    ///
    /// As the parts.
    pub async fn connect(
        config: ModalConfig,
        options: ModalOptions,
        progress: ProgressFn<'_>,
    ) -> Result<Self> {
        options.validate()?;
        let client = ModalClient::connect(config).await?;
        let setup_code = options.setup_code.clone();
        let machine = ModalMachine::prepare(client, options, progress).await?;
        Ok(Self(ProcessBackend::new(machine, setup_code)))
    }

    /// Reads a snapshot that a session in a process has saved.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn load_snapshot(&self, path: impl AsRef<Path>) -> Result<Snapshot> {
        self.0.load_snapshot(path.as_ref())
    }
}

#[async_trait]
impl Backend for ModalBackend {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        self.0.open(options).await
    }
}
