//! The sessions of a REPL: branches that were forked from each other, each with its way back.

use std::path::PathBuf;

use kaa::{Environment, Limits, Snapshot};
use tempfile::TempDir;

use super::Failure;
use super::session::{self, Base};

/// Snapshots that a branch holds in memory, each with the pages that its cell changed; older ones
/// become files.
const HELD_MAX: usize = 64;

/// Where a cell can be undone to.
enum Undo {
    Held(Snapshot),
    File(PathBuf),
    /// Nowhere, and why.
    Refused(String),
}

/// A session and the states before each of its cells.
pub(super) struct Branch {
    pub(super) environment: Box<dyn Environment>,
    undo: Vec<Undo>,
    /// How many of `undo` are no longer in memory.
    spilled: usize,
}

/// All sessions of a REPL; one of them gets the cells.
pub(super) struct Branches {
    branches: Vec<Branch>,
    current: usize,
    /// Made when the first snapshot is written.
    directory: Option<TempDir>,
    files: u64,
}

impl Branches {
    pub(super) fn new(environment: Box<dyn Environment>) -> Self {
        let branch = Branch { environment, undo: Vec::new(), spilled: 0 };
        Self { branches: vec![branch], current: 0, directory: None, files: 0 }
    }

    /// The session that gets the cells.
    pub(super) fn environment(&mut self) -> &mut dyn Environment {
        &mut *self.branches[self.current].environment
    }

    /// Its number from 1 on, and how many there are.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.current + 1, self.branches.len())
    }

    /// Remembers the state before a cell, where that costs nothing: a backend that saves variable by
    /// variable would run code of the cells for it, and may leave some behind.
    pub(super) async fn remember(&mut self) {
        let branch = &mut self.branches[self.current];
        if !branch.environment.capabilities().rollback {
            return;
        }
        let undo = match branch.environment.snapshot().await {
            Ok(snapshot) => Undo::Held(snapshot),
            Err(error) => Undo::Refused(error.to_string()),
        };
        branch.undo.push(undo);
        if branch.undo.len() - branch.spilled > HELD_MAX {
            let at = branch.spilled;
            branch.spilled += 1;
            if let Undo::Held(snapshot) = &branch.undo[at] {
                let snapshot = snapshot.clone();
                self.branches[self.current].undo[at] = match self.spill(&snapshot) {
                    Ok(path) => Undo::File(path),
                    Err(reason) => Undo::Refused(reason),
                };
            }
        }
    }

    fn spill(&mut self, snapshot: &Snapshot) -> Result<PathBuf, String> {
        if self.directory.is_none() {
            self.directory = Some(tempfile::tempdir().map_err(|e| e.to_string())?);
        }
        let directory = self.directory.as_ref().map_or(std::path::Path::new(""), TempDir::path);
        let path = directory.join(self.files.to_string());
        self.files += 1;
        snapshot.save(&path).map_err(|e| e.to_string())?;
        Ok(path)
    }

    /// Goes back to before the last `cells` cells.
    pub(super) async fn rewind(
        &mut self,
        base: &Base,
        limits: &Limits,
        cells: usize,
    ) -> Result<(), Failure> {
        let branch = &mut self.branches[self.current];
        let kaa::Capabilities { backend, rollback, .. } = branch.environment.capabilities();
        if !rollback {
            let error = kaa::Error::Unsupported { backend, operation: "rewind" };
            let help = ":save FILE keeps a state, and --snapshot-in FILE begins with it";
            return Err(Failure::Usage(format!("{error}; {help}")));
        }
        let Some(at) = branch.undo.len().checked_sub(cells).filter(|_| cells > 0) else {
            return Err(Failure::Usage(match branch.undo.len() {
                0 => "there is no cell to undo".into(),
                1 => format!("there is 1 cell to undo, not {cells}"),
                have => format!("there are {have} cells to undo, not {cells}"),
            }));
        };
        let snapshot = match &branch.undo[at] {
            Undo::Held(snapshot) => snapshot.clone(),
            Undo::File(path) => base.load(path, limits)?,
            Undo::Refused(reason) => {
                return Err(Failure::Usage(format!(
                    "the state before that cell could not be saved ({reason}); rewind further"
                )));
            }
        };
        branch.environment.restore(&snapshot).await?;
        branch.undo.truncate(at);
        branch.spilled = branch.spilled.min(at);
        Ok(())
    }

    /// Makes a second session in this state and goes there; it can't be rewound to before this.
    /// Returns the names of what the copy is without.
    pub(super) async fn fork(&mut self) -> Result<Option<String>, Failure> {
        let snapshot = self.environment().snapshot().await?;
        let environment = self.environment().fork().await?;
        self.branches.push(Branch { environment, undo: Vec::new(), spilled: 0 });
        self.current = self.branches.len() - 1;
        Ok(session::unsaved(&snapshot))
    }

    /// Goes to the session of this number.
    pub(super) fn go_to(&mut self, number: usize) -> Result<(), Failure> {
        let index = number.checked_sub(1).filter(|index| *index < self.branches.len());
        self.current = index.ok_or_else(|| {
            Failure::Usage(match self.branches.len() {
                1 => format!("there is no session {number}, only 1; :fork makes another"),
                count => format!("there is no session {number}, only 1 to {count}"),
            })
        })?;
        Ok(())
    }

    /// Forgets the ways back: the session was begun anew.
    pub(super) fn forget(&mut self) {
        let branch = &mut self.branches[self.current];
        branch.undo.clear();
        branch.spilled = 0;
    }

    /// Ends all sessions, also those after one that doesn't end.
    pub(super) async fn close(self) -> kaa::Result<()> {
        let mut closed = Ok(());
        for branch in self.branches {
            closed = closed.and(branch.environment.close().await);
        }
        closed
    }
}
