//! An engine as a source of sessions.

use std::path::Path;

use async_trait::async_trait;

use super::{DockerMachine, DockerOptions};
use crate::environment::{Backend, Capabilities, Environment, EnvironmentOptions};
use crate::error::Result;
use crate::image::ProgressFn;
use crate::process::ProcessBackend;
use crate::snapshot::Snapshot;

/// Sessions in containers of one image.
///
/// Needs a tokio runtime with time and I/O enabled. [`Limits::memory_bytes`](crate::Limits) is data of
/// the worker; the container has that, [`disk_bytes`](crate::Limits::disk_bytes), which are memory as
/// well, and 72 MiB for everything else. What is written to a mount isn't counted, only the size of
/// each file is bounded. A seed, a fixed clock and a limit of fuel are refused as unsupported.
///
/// ```no_run
/// use kaa::docker::{DockerBackend, DockerOptions};
/// use kaa::{Backend, EnvironmentExt, EnvironmentOptions};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> kaa::Result<()> {
/// let backend = DockerBackend::connect(DockerOptions::default(), &|_| {}).await?;
/// let mut session = backend.open(EnvironmentOptions::default()).await?;
/// assert_eq!(session.execute("1 + 1").await?.value.as_deref(), Some("2"));
/// session.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct DockerBackend(ProcessBackend);

impl DockerBackend {
    /// Finds the engine, checks that it's one that can be used, finds the image or pulls it, which
    /// `progress` hears of, and removes the containers that dead processes of this host have left there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for options out of range,
    /// [`Error::Unavailable`](crate::Error::Unavailable) when the engine or the image can't be had,
    /// [`Error::Incompatible`](crate::Error::Incompatible) for an engine that is too old, or that can't
    /// do what it has to. All of them come within seconds, but for a pull.
    pub async fn connect(options: DockerOptions, progress: ProgressFn<'_>) -> Result<Self> {
        let setup_code = options.setup_code.clone();
        let machine = DockerMachine::connect(options, progress).await?;
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
impl Backend for DockerBackend {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        self.0.open(options).await
    }
}
