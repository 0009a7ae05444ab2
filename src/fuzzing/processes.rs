//! Sessions in processes that are whatever sits at the other end of the streams.

use std::fmt;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::environment::{Backend, Capabilities, Environment, EnvironmentOptions};
use crate::error::{Error, Result};
use crate::process::{Life, Machine, ProcessBackend, Started, Surroundings};

const BACKEND: &str = "fuzzing";

/// What the supervisor writes to.
pub type Reader = Box<dyn AsyncRead + Send + Sync + Unpin>;
/// What the supervisor reads from.
pub type Writer = Box<dyn AsyncWrite + Send + Sync + Unpin>;

/// Sessions whose supervisors are at the other end of what `connect` returns.
pub fn backend(connect: impl Fn() -> (Reader, Writer) + Send + Sync + 'static) -> impl Backend {
    Wired(ProcessBackend::new(Wires(Box::new(connect)), None))
}

struct Wired(ProcessBackend);

#[async_trait]
impl Backend for Wired {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        self.0.open(options).await
    }
}

struct Wires(Box<dyn Fn() -> (Reader, Writer) + Send + Sync>);

impl fmt::Debug for Wires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wires")
    }
}

#[async_trait]
impl Machine for Wires {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none(BACKEND)
    }

    fn check(&self, _: &EnvironmentOptions) -> Result<()> {
        Ok(())
    }

    async fn start(&self, _: &[&str], _: &EnvironmentOptions) -> Result<Started> {
        let (reader, writer) = (self.0)();
        let surroundings = Surroundings {
            scratch: "/tmp".into(),
            is_alone: true,
            data_bytes: None,
            file_bytes: None,
            user: None,
            door: None,
        };
        Ok(Started { reader, writer, life: Box::new(Wire), surroundings, calls: None })
    }
}

/// The power over a process that isn't one.
struct Wire;

#[async_trait]
impl Life for Wire {
    fn kill(&mut self) {}

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }

    async fn autopsy(&mut self) -> Error {
        Error::Poisoned { reason: "its stream has ended".into() }
    }
}
