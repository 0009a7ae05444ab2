//! Sessions in sandboxes of Modal.
mod config;
mod image;
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

use std::path::Path;
use std::time::SystemTime;

use async_trait::async_trait;

pub use self::config::ModalConfig;
pub use self::image::ModalImage;
pub use self::options::{Carrier, ModalOptions, Network, Secret};
use crate::environment::{Backend, Capabilities, Environment, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::image::ProgressFn;
use crate::process::ProcessBackend;
use crate::snapshot::Snapshot;

/// What Kaa's own tags begin with.
const TAG_PREFIX: &str = "kaa-";

/// Sessions in sandboxes of Modal.
#[derive(Debug, Clone)]
pub struct ModalBackend(ProcessBackend);

impl ModalBackend {
    /// What sessions in sandboxes can do. Snapshots there are where the image's Python has dill.
    pub const CAPABILITIES: Capabilities = Capabilities {
        backend: "modal",
        isolated: true,
        fuel: false,
        rollback: false,
        snapshot: false,
        deterministic: false,
    };

    /// Finds the app and builds the image.
    ///
    /// # Errors
    ///
    /// As the parts.
    pub async fn connect(
        _config: ModalConfig,
        options: ModalOptions,
        _progress: ProgressFn<'_>,
    ) -> Result<Self> {
        options.validate()?;
        Err(Error::unavailable("Modal", "not yet"))
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

/// Modal, as somebody with these credentials.
#[derive(Debug, Clone)]
pub struct ModalClient {}

/// A sandbox that Modal knows.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxReport {
    /// Its id.
    pub id: String,
    /// When it was made.
    pub created_at: SystemTime,
    /// Its tags.
    pub tags: Vec<(String, String)>,
    /// Whether the process that made it lives, as far as that's known here: one of this machine.
    pub has_owner: Option<bool>,
}

impl ModalClient {
    /// Asks Modal for a token.
    ///
    /// # Errors
    ///
    /// As connect.
    pub async fn connect(_config: ModalConfig) -> Result<Self> {
        Err(Error::unavailable("Modal", "not yet"))
    }

    /// The sandboxes of Kaa's sessions that live, of all apps or of one, oldest first.
    ///
    /// # Errors
    ///
    /// As connect.
    pub async fn sandboxes(&self, _app: Option<&str>) -> Result<Vec<SandboxReport>> {
        Ok(Vec::new())
    }

    /// Ends a sandbox.
    ///
    /// # Errors
    ///
    /// As connect.
    pub async fn terminate(&self, _id: &str) -> Result<()> {
        Ok(())
    }
}
/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {}
impl Sandbox {
    /// Snapshot.
    ///
    /// # Errors
    ///
    /// As.
    pub async fn snapshot_filesystem(&self) -> Result<String> {
        Err(Error::unavailable("Modal", "not yet"))
    }
}
