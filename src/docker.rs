//! Sessions in containers, over the API of a Docker engine.
//!
//! A session is a container whose main process is the supervisor of `process`, reached
//! over the attached stdin and stdout. No port is opened and nothing is mounted for that: what a cell
//! asks of the host (language models, tools) travels on the same channel, so that a session needs no
//! network and by default has none.
//!
//! A container ends when the connection to it ends, and the engine removes what has ended: a host that
//! is killed leaves nothing behind. What an engine that was killed as well leaves is found by its label
//! and removed by the next [`connect`](DockerBackend::connect).

mod address;
mod backend;
mod container;
mod engine;
mod fault;
mod spec;
mod streams;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use self::address::DockerHost;
pub use self::backend::DockerBackend;
use self::container::Container;
use self::engine::{Engine, ImageFacts};
pub use self::engine::{EngineReport, examine};
use crate::environment::{Capabilities, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::image::ProgressFn;
use crate::process::{Machine, Owner, Started};

/// The backend's name.
const BACKEND: &str = "docker";
/// What sessions can do of themselves; whether there are snapshots, their Python decides.
const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    isolated: true,
    fuel: false,
    rollback: false,
    snapshot: false,
    deterministic: false,
};
/// The fewest processes and threads with which a supervisor, a worker and their threads can live.
const PIDS_MIN: u32 = 16;
/// What an engine accepts as a share of a processor.
const CPUS_MIN: f64 = 0.01;

/// When an image is fetched from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pull {
    /// When the engine doesn't have it.
    #[default]
    Missing,
    /// Never: an image that isn't there is an error.
    Never,
}

/// What network the containers of sessions have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Network {
    /// None but a loopback of their own. Calls of language models don't need any.
    #[default]
    None,
    /// The engine's default bridge: whatever the engine's machine reaches, the guest reaches.
    Bridge,
    /// A network that was made with `docker network create`.
    Named(String),
}

/// How sessions in containers are set up. The defaults are safe: no network, a root file system that
/// can't be written, no capabilities, no root.
#[derive(Debug, Clone, PartialEq)]
pub struct DockerOptions {
    /// Where the engine is. Default: `unix:///var/run/docker.sock`.
    pub host: DockerHost,
    /// The image: any with Python 3.9 or newer. A name without a tag means `:latest`, as everywhere.
    /// Default: `python:3.11-slim`.
    pub image: String,
    /// Whether an image that is missing is pulled. Default: it is.
    pub pull: Pull,
    /// How long a pull may take in all. Default: 30 min.
    pub pull_timeout: Duration,
    /// What network the guest has. Default: none.
    pub network: Network,
    /// The OCI runtime, such as `runsc` for gVisor; the engine must have it registered. Default: the
    /// engine's own.
    pub runtime: Option<String>,
    /// Processors that a session may use at a time, in parts of one. Default: 1.
    pub cpus: f64,
    /// Processes and threads that a session may have at a time, at least 16. Default: 128.
    pub pids: u32,
    /// Who the guest is, as `UID:GID`. Default: `65534:65534`, nobody. Names must be in the image.
    pub user: String,
    /// Python that runs once when a session is opened, before its first cell. Default: none.
    pub setup_code: Option<String>,
    /// The interpreter: a path in the image, or a name on its `PATH`. Default: `python3`.
    pub python: String,
    /// Whether sessions are opened on an engine that can't limit memory, processes or processors, as
    /// rootless engines on cgroups of version 1 can't. Default: no, that is an error.
    pub allow_missing_limits: bool,
}

impl Default for DockerOptions {
    fn default() -> Self {
        Self {
            host: DockerHost::default(),
            image: "python:3.11-slim".into(),
            pull: Pull::default(),
            pull_timeout: Duration::from_secs(30 * 60),
            network: Network::default(),
            runtime: None,
            cpus: 1.0,
            pids: 128,
            user: "65534:65534".into(),
            setup_code: None,
            python: "python3".into(),
            allow_missing_limits: false,
        }
    }
}

impl DockerOptions {
    /// Checks every field that can be checked without an engine.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the field and what would be right.
    pub fn validate(&self) -> Result<()> {
        self.host.validate()?;
        for (field, value) in [
            ("docker.image", &self.image),
            ("docker.user", &self.user),
            ("docker.python", &self.python),
        ] {
            if value.is_empty() || value.contains(|c: char| c.is_control() || c == ' ') {
                let reason = format!("{value:?} is empty or has blanks in it; leave it out");
                return Err(Error::invalid(field, reason));
            }
        }
        if !self.cpus.is_finite() || self.cpus < CPUS_MIN {
            let reason = format!("must be at least {CPUS_MIN}, not {}", self.cpus);
            return Err(Error::invalid("docker.cpus", reason));
        }
        if self.pids < PIDS_MIN {
            let reason = format!("must be at least {PIDS_MIN}, not {}", self.pids);
            return Err(Error::invalid("docker.pids", reason));
        }
        if let Network::Named(name) = &self.network
            && (["", "none", "host", "default", "bridge"].contains(&&**name) || name.contains(':'))
        {
            let reason = format!(
                "{name:?} isn't the name of a network of its own; the host's and another \
                 container's network are no sandbox"
            );
            return Err(Error::invalid("docker.network", reason));
        }
        Ok(())
    }
}

/// A Docker engine as a machine that starts processes.
#[derive(Debug)]
pub(crate) struct DockerMachine {
    engine: Arc<Engine>,
    options: DockerOptions,
    image: ImageFacts,
    /// What marks the containers of this process.
    owner: String,
}

impl DockerMachine {
    /// Finds the engine, checks that it's one that can be used, finds or pulls the image, and removes
    /// what dead processes of this host have left there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for options out of range, [`Error::Unavailable`] when the engine or the image
    /// can't be had, [`Error::Incompatible`] for an engine that is too old or can't do what it must.
    pub(crate) async fn connect(options: DockerOptions, progress: ProgressFn<'_>) -> Result<Self> {
        options.validate()?;
        let engine = Engine::connect(&options.host).await?;
        engine.check(&options).await?;
        let image = engine.image(&options, progress).await?;
        let me = Owner::of_this_process();
        if let Some(me) = &me {
            engine.remove_leftovers(me).await?;
        }
        let owner = me.map_or_else(|| "unknown".to_owned(), |me| me.to_string());
        Ok(Self { engine: Arc::new(engine), options, image, owner })
    }
}

#[async_trait]
impl Machine for DockerMachine {
    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn check(&self, options: &EnvironmentOptions) -> Result<()> {
        spec::mounts(&options.policy.mounts, &self.options.host).map(|_| ())
    }

    async fn start(&self, arguments: &[&str], options: &EnvironmentOptions) -> Result<Started> {
        let session = format!("{:016x}", rand::random::<u64>());
        let plan = spec::Plan {
            options: &self.options,
            image: &self.image,
            owner: &self.owner,
            session: &session,
        };
        let body = plan.body(arguments, options)?;
        let surroundings = spec::surroundings(options);
        let allowed_bytes = options.limits.memory_bytes;
        let subject = verdict::Subject {
            host: self.engine.host().to_owned(),
            image: self.options.image.clone(),
            python: self.options.python.clone(),
            memory_bytes: allowed_bytes,
        };
        Container::start(Arc::clone(&self.engine), &session, body, subject, surroundings).await
    }
}
