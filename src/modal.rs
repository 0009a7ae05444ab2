//! Sessions in sandboxes of Modal, over the gRPC API that Modal's own clients use.
//!
//! **Modal calls this API internal and unsupported**; it may change without notice. What is here says
//! what version 1.6.4 of Modal's Python client says, and takes it from there whom it says to be: a client
//! that isn't Modal's. It was run against a stand-in of Modal, which is in the tests, and has not been run
//! against Modal itself.
//!
//! A session is a sandbox of its own, in which one long-lived process, the supervisor of `process`, is
//! reached over its stdin and stdout: what a cell asks of the host (language models, tools) travels there,
//! too, so that a session needs no network and by default has none. Bytes have offsets in both
//! directions: whatever becomes of a connection, each of them arrives once, so that no cell runs twice.
//!
//! A sandbox is ended when its session is closed or dropped, which is tried for ten minutes in an outage,
//! by its timeout whatever happens, and when a later process of the same machine
//! [connects](ModalBackend::connect) and finds that its owner is dead.
//!
//! [`ModalClient`] and [`Sandbox`] are what sessions are made of: apps, images, sandboxes, processes in
//! them, tunnels, and snapshots of their files.

mod app;
mod channel;
mod client;
mod config;
mod ending;
mod fault;
mod image;
mod leftovers;
mod machine;
mod options;
mod outage;
mod process;
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    reason = "generated"
)]
mod proto;
mod relay;
mod retry;
mod router;
mod sandbox;
mod spec;
mod stdin;
mod stdout;
mod token;
mod until;

use std::path::Path;

use async_trait::async_trait;

pub use self::client::ModalClient;
pub use self::config::ModalConfig;
pub use self::image::ModalImage;
pub use self::leftovers::SandboxReport;
use self::machine::ModalMachine;
pub use self::options::{Carrier, ModalOptions, Network, Secret};
pub use self::process::SandboxProcess;
pub use self::router::ProcessExit;
pub use self::sandbox::Sandbox;
pub use self::spec::SandboxSpec;
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

/// Sessions in sandboxes of one image.
///
/// Needs a tokio runtime with time and I/O enabled. [`Limits::memory_bytes`](crate::Limits) is data of
/// the worker; the sandbox has that and 128 MiB. Of files only the size of each is bounded
/// ([`disk_bytes`](crate::Limits::disk_bytes)). Mounts, a seed, a fixed clock and a limit of fuel are
/// refused as unsupported.
///
/// ```no_run
/// use kaa::modal::{ModalBackend, ModalConfig, ModalOptions};
/// use kaa::{Backend, EnvironmentExt, EnvironmentOptions};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> kaa::Result<()> {
/// let config = ModalConfig::load(|name| std::env::var(name).ok())?;
/// let backend = ModalBackend::connect(config, ModalOptions::default(), &|_| {}).await?;
/// let mut session = backend.open(EnvironmentOptions::default()).await?;
/// assert_eq!(session.execute("1 + 1").await?.value.as_deref(), Some("2"));
/// session.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ModalBackend(ProcessBackend);

impl ModalBackend {
    /// What sessions in sandboxes can do. Snapshots there are where the image's Python has dill.
    pub const CAPABILITIES: Capabilities = CAPABILITIES;

    /// Asks Modal for a token, finds the app or makes it, builds the image, which `progress` hears of,
    /// unless Modal has it, and ends the sandboxes that dead processes of this machine have left.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for options out of range,
    /// [`Error::Unavailable`](crate::Error::Unavailable) when Modal can't be reached, refuses the
    /// credentials, or can't build the image.
    pub async fn connect(
        config: ModalConfig,
        options: ModalOptions,
        progress: ProgressFn<'_>,
    ) -> Result<Self> {
        options.validate()?;
        let client = ModalClient::connect(config).await?;
        let setup_code = options.setup_code.clone();
        let machine = Box::pin(ModalMachine::prepare(client, options, progress)).await?;
        Ok(Self(ProcessBackend::new(machine, setup_code)))
    }

    /// Reads a snapshot that a session in a process has saved. Blocks. Loading it into a session runs
    /// what it says, with all that the session may do.
    ///
    /// # Errors
    ///
    /// [`Error::Io`](crate::Error::Io) when it can't be read,
    /// [`Error::Incompatible`](crate::Error::Incompatible) when it isn't one,
    /// [`Error::Invalid`](crate::Error::Invalid) when it's too long.
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
