//! What stands for `docker.rs` in a program that was built without the feature `docker`.

use clap::Args;
use kaa::{Capabilities, ProgressFn};

use super::Failure;
use super::doctor::{Doctor, Finding};
use super::session::Processes;

const ABSENT: &str =
    "this program was built without containers; build it with the feature `docker`";
/// Nothing is there to be able to do anything.
pub(super) const CAPABILITIES: Option<Capabilities> = None;

/// There are no flags: nothing is there that they could be about.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct DockerFlags {}

/// Never made.
#[derive(Debug)]
pub(super) enum DockerPlan {}

impl DockerFlags {
    /// As of the flags that aren't there.
    pub(super) fn given(&self) -> Vec<(&'static str, bool)> {
        Vec::new()
    }

    #[cfg(feature = "benchmark")]
    pub(super) fn set_runtime(&mut self, _runtime: &str) {}

    /// Says that there are no containers.
    pub(super) fn resolve(
        self,
        _python: Option<String>,
        _setup_code: Option<String>,
        _cpus: Option<f64>,
    ) -> Result<DockerPlan, Failure> {
        Err(Failure::usage("--backend", ABSENT))
    }
}

impl DockerPlan {
    #[cfg(feature = "benchmark")]
    pub(super) fn arguments(&self) -> Vec<String> {
        match *self {}
    }

    #[cfg(feature = "benchmark")]
    pub(super) fn is_here(&self) -> bool {
        match *self {}
    }

    #[cfg(feature = "benchmark")]
    pub(super) async fn engine(&self) -> Result<String, Failure> {
        match *self {}
    }

    pub(super) async fn connect(&self, _progress: ProgressFn<'_>) -> Result<Processes, Failure> {
        match *self {}
    }
}

/// As of an engine that isn't there.
pub(super) fn examine(
    doctor: &Doctor,
    _flags: DockerFlags,
    _python: Option<String>,
) -> Result<Option<bool>, Failure> {
    doctor.say(Finding::Missing, "docker engine", ABSENT)?;
    Ok(None)
}
