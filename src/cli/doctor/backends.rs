//! What `kaa doctor` finds about the backends: it opens a session of each, and lists what they can do.

use std::time::Instant;

use kaa::{
    Backend, Capabilities, EnvironmentExt, EnvironmentOptions, LocalBackend, Outcome, WasmBackend,
};

use super::{Doctor, Finding};
use crate::cli::Failure;
use crate::cli::backend::local_options;
use crate::cli::console::excerpt;
use crate::cli::{docker, modal, session};

/// Says which Python it is, on one line.
const WHO: &str =
    "import sys; print(sys.implementation.name, sys.version.split()[0], 'at', sys.executable)";

/// What a session of a backend said about itself.
pub(in crate::cli) struct Probe {
    python: String,
    milliseconds: f64,
    dill: bool,
}

/// What is known of a backend elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::cli) struct Remote {
    /// Whether it takes who asks.
    pub(in crate::cli) is_reached: bool,
    /// Whether sessions can be saved, if one was opened.
    pub(in crate::cli) saves: Option<bool>,
}

/// Opens a session, asks it who it is, and ends it.
pub(in crate::cli) async fn probe(backend: &dyn Backend) -> Result<Probe, String> {
    let words = |error: kaa::Error| crate::cli::in_flags(&error.to_string());
    let started = Instant::now();
    let mut session = backend.open(EnvironmentOptions::default()).await.map_err(words)?;
    let cell = session.execute(WHO).await;
    let milliseconds = started.elapsed().as_secs_f64() * 1e3;
    let dill = session.capabilities().snapshot;
    session.close().await.map_err(words)?;
    let cell = cell.map_err(words)?;
    if cell.outcome != Outcome::Completed {
        return Err(format!("its first cell failed: {}", excerpt(&cell.stderr.text())));
    }
    Ok(Probe { python: excerpt(&cell.stdout.text()), milliseconds, dill })
}

impl Doctor {
    /// Whether local sessions can be saved; `None` when there can't be any.
    pub(super) fn local(&self, python: Option<String>) -> Result<Option<bool>, Failure> {
        let backend = LocalBackend::new(local_options(python, None));
        match session::block_on(async { Ok(probe(&backend).await) })? {
            Ok(probe) => self.probed("local", &probe, "`python3 -m pip install dill`").map(Some),
            Err(reason) => {
                self.say(Finding::Missing, "local python", &reason)?;
                Ok(None)
            }
        }
    }

    /// Says what a session said; whether it can be saved.
    pub(in crate::cli) fn probed(
        &self,
        backend: &str,
        probe: &Probe,
        remedy: &str,
    ) -> Result<bool, Failure> {
        let Probe { python, milliseconds, dill } = probe;
        let text = format!("{python}; {milliseconds:.0} ms to its first cell");
        self.say(Finding::Ok, &format!("{backend} python"), &text)?;
        let what = format!("{backend} dill");
        match dill {
            true => self.say(Finding::Ok, &what, "installed: sessions can be saved")?,
            false => {
                let text = format!("not installed: sessions can't be saved or forked; {remedy}");
                self.say(Finding::Note, &what, &text)?;
            }
        }
        Ok(*dill)
    }

    /// One line per backend: whether it can be used.
    pub(super) fn backends(
        &self,
        ready: bool,
        local: Option<bool>,
        docker: Option<bool>,
        modal: Remote,
    ) -> Result<(), Failure> {
        match (self.unusable, ready) {
            (true, _) => self.say(Finding::Missing, "backend wasm", "see above")?,
            (false, true) => self.say(Finding::Ok, "backend wasm", "ready")?,
            (false, false) => {
                self.say(Finding::Ok, "backend wasm", "will be set up by the first use")?;
            }
        }
        match local {
            Some(_) => self.say(Finding::Ok, "backend local", "ready, without any isolation")?,
            None => self.say(Finding::Missing, "backend local", "see above")?,
        }
        match docker {
            Some(_) => self.say(Finding::Ok, "backend docker", "ready")?,
            None => self.say(Finding::Missing, "backend docker", "see above")?,
        }
        match (modal.is_reached, modal.saves) {
            (true, Some(_)) => self.say(Finding::Ok, "backend modal", "ready"),
            (true, None) => {
                let text = "reached; no sandbox was made, which costs money: --modal-sandbox does";
                self.say(Finding::Ok, "backend modal", text)
            }
            (false, _) => self.say(Finding::Missing, "backend modal", "see above"),
        }
    }

    /// What the backends can do.
    pub(super) fn table(
        &self,
        local: Option<bool>,
        docker: Option<bool>,
        modal: Remote,
    ) -> Result<(), Failure> {
        let heads = ["isolated", "fuel", "rollback", "snapshot", "deterministic"];
        self.row("", &heads)?;
        self.capabilities(&WasmBackend::CAPABILITIES, Some(true))?;
        self.capabilities(&LocalBackend::CAPABILITIES, local)?;
        for (capabilities, saves) in
            [(docker::CAPABILITIES, docker), (modal::CAPABILITIES, modal.saves)]
        {
            if let Some(capabilities) = capabilities {
                self.capabilities(&capabilities, saves)?;
            }
        }
        Ok(())
    }

    /// `saves` is what a session said, if there was one.
    fn capabilities(&self, what: &Capabilities, saves: Option<bool>) -> Result<(), Failure> {
        let word = |can: bool| if can { "yes" } else { "no" };
        let snapshot = match saves {
            _ if what.snapshot => "yes",
            Some(true) => "dill: yes",
            Some(false) => "dill: no",
            None => "with dill",
        };
        let Capabilities { isolated, fuel, rollback, deterministic, .. } = what;
        let cells = [word(*isolated), word(*fuel), word(*rollback), snapshot, word(*deterministic)];
        self.row(what.backend, &cells)
    }

    fn row(&self, head: &str, cells: &[&str; 5]) -> Result<(), Failure> {
        let [isolated, fuel, rollback, snapshot, deterministic] = cells;
        let line = format!(
            "{:<8} {head:<15} {isolated:<9} {fuel:<5} {rollback:<9} {snapshot:<10} {deterministic}",
            "can"
        );
        self.console.line(line.trim_end())
    }
}
