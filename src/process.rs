//! Guests that are processes: CPython somewhere else, reached over a pair of byte streams.
//!
//! A machine (this host, a container engine, a cloud) starts `python3` with the arguments it is given
//! and carries the bytes of its stdin and stdout; everything else is here, once for all of them. The
//! interpreter becomes a supervisor, which forks the worker that the cells run in: see
//! `guest/supervisor.py`.

mod backend;
#[cfg(feature = "modal")]
mod calls;
mod environment;
mod guest;
mod link;
#[cfg(any(feature = "docker", feature = "modal"))]
mod owner;
mod saved;
mod turn;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::environment::{Capabilities, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::lm::Secret;
use crate::protocol::Message;

pub(crate) use self::backend::ProcessBackend;
#[cfg(feature = "modal")]
pub(crate) use self::calls::{BrokerCalls, CARRIED_BYTES_MAX};
#[cfg(any(feature = "docker", feature = "modal"))]
pub(crate) use self::owner::Owner;
#[cfg(feature = "docker")]
pub(crate) use self::owner::started as process_started;

/// Where processes are started.
#[async_trait]
pub(crate) trait Machine: fmt::Debug + Send + Sync + 'static {
    /// What its sessions can do, as far as that's known before one is started.
    fn capabilities(&self) -> Capabilities;

    /// Refuses what the machine can't do, by name, before anything is started.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] and [`Error::Invalid`].
    fn check(&self, options: &EnvironmentOptions) -> Result<()>;

    /// Starts `python3` with these arguments for one session. It returns as soon as bytes can be
    /// written: the process needn't run yet.
    ///
    /// # Errors
    ///
    /// Whatever kept it from that, with a remedy; nothing is left behind then, nor when the future
    /// is dropped.
    async fn start(&self, arguments: &[&str], options: &EnvironmentOptions) -> Result<Started>;
}

/// A started process.
pub(crate) struct Started {
    /// Its stdout.
    pub(crate) reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
    /// Its stdin. Dropping it ends the process.
    pub(crate) writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    pub(crate) life: Box<dyn Life>,
    pub(crate) surroundings: Surroundings,
    /// The way of the worker's calls of language models, where it isn't that of everything else. The
    /// surroundings then have a door.
    pub(crate) calls: Option<Box<dyn CallCarrier>>,
}

/// Carries calls of language models from a session's worker to the host, and their answers back.
///
/// Everything that it brings is hostile, like what comes over the streams.
#[async_trait]
pub(crate) trait CallCarrier: Send + Sync {
    /// The next call, and the key of its answer. May be dropped without a loss. Calls that come
    /// between turns wait for the next one.
    ///
    /// # Errors
    ///
    /// Why no call will come any more, and what to do about it.
    async fn next(&mut self) -> Result<(u64, Bytes)>;

    /// Answers a call, without waiting for that. A key that has no call any more is left alone.
    fn answer(&mut self, key: u64, message: Message);

    /// There is a worker of this number: what others before it have asked needs no answer.
    fn begin_worker(&mut self, number: u64);
}

/// Where a worker gives its calls of language models away, instead of to its supervisor.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    /// The port of a broker (`guest/broker/`), seen from the worker at 127.0.0.1.
    pub(crate) port: u16,
    /// What its guests are known by.
    pub(crate) token: Secret,
    /// Bytes of a call that it takes. Longer ones take the way of all others.
    pub(crate) bytes_max: usize,
}

/// What the supervisor has to know about where it is.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// The directory for the guest's files: where cells start, and what `TMPDIR` says.
    pub(crate) scratch: String,
    /// Whether every process that the supervisor can see belongs to the session.
    pub(crate) is_alone: bool,
    /// Bytes of data that the worker may have, if the system bounds them (`RLIMIT_DATA`).
    pub(crate) data_bytes: Option<u64>,
    /// Bytes of one file that it writes (`RLIMIT_FSIZE`).
    pub(crate) file_bytes: Option<u64>,
    /// The number of the user that the worker becomes, if its supervisor is root.
    pub(crate) user: Option<u32>,
    /// None: calls of language models take the way of all others.
    pub(crate) door: Option<Door>,
}

/// Power over a started process. Dropping it ends the process, too, and leaves nothing behind.
#[async_trait]
pub(crate) trait Life: Send + Sync {
    /// Ends the process and all that it started, without waiting for that.
    fn kill(&mut self);

    /// Ends the process and all that it started, and waits until nothing of it is left, also after
    /// [`kill`](Self::kill) where nothing else would end it. Bounded in time.
    ///
    /// # Errors
    ///
    /// What could not be given back.
    async fn close(&mut self) -> Result<()>;

    /// Time that a turn may take beside its own when so many bytes go one way or the other: where the
    /// line to the process is slow, or may be away for a while.
    fn slack(&self, bytes: usize) -> Duration {
        let _ = bytes;
        Duration::ZERO
    }

    /// The process ended though nobody asked it to, or said what no supervisor says: why, as far as
    /// the machine knows, and what to do about it. Bounded in time.
    async fn autopsy(&mut self) -> Error;
}
