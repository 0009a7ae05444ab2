//! What stands for `modal.rs` in a program that was built without the feature `modal`.

use clap::{Args, Subcommand};
use kaa::{Capabilities, ProgressFn};

use super::doctor::backends::Remote;
use super::doctor::{Doctor, Finding};
use super::session::Processes;
use super::{Ending, Failure};

const ABSENT: &str = "this program was built without Modal; build it with the feature `modal`";
/// Nothing is there to be able to do anything.
pub(super) const CAPABILITIES: Option<Capabilities> = None;

/// There are no flags: nothing is there that they could be about.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct ModalFlags {}

/// Never made.
#[derive(Debug)]
pub(super) enum ModalPlan {}

impl ModalFlags {
    /// As of the flags that aren't there.
    pub(super) fn given(&self) -> Vec<(&'static str, bool)> {
        Vec::new()
    }

    /// Says that there is no Modal.
    pub(super) fn resolve(
        self,
        _python: Option<String>,
        _setup_code: Option<String>,
        _cpus: Option<f64>,
    ) -> Result<ModalPlan, Failure> {
        Err(Failure::usage("--backend", ABSENT))
    }
}

impl ModalPlan {
    pub(super) async fn connect(&self, _progress: ProgressFn<'_>) -> Result<Processes, Failure> {
        match *self {}
    }
}

/// The commands that aren't there, so that they're told from a mistyped one.
#[derive(Debug, Subcommand)]
pub(super) enum ModalCommand {
    /// List the sandboxes that Kaa has made and that live
    List,
    /// End the sandboxes of dead processes
    Clean,
}

/// Says that there is no Modal.
pub(super) fn run(_command: ModalCommand) -> Result<Ending, Failure> {
    Err(Failure::Usage(ABSENT.into()))
}

/// As of a Modal that isn't there.
pub(super) fn examine(
    doctor: &Doctor,
    _flags: ModalFlags,
    _python: Option<String>,
    _opens: bool,
) -> Result<Remote, Failure> {
    doctor.say(Finding::Missing, "modal token", ABSENT)?;
    Ok(Remote::default())
}
