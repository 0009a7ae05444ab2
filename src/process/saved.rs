//! Snapshots of sessions in processes: their variables, as `dill` saves them.
//!
//! The file is what RLM's Docker environment keeps as `state.dill`: the pickle of a dict. The host
//! never takes it apart, because a pickle runs what it says; only a session does.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::protocol::CALL_BYTES_MAX;
use crate::snapshot::SnapshotData;

/// What a pickle of protocol 2 or later begins with: `PROTO` in CPython's Lib/pickle.py.
const PICKLE: u8 = 0x80;

/// The variables of a session.
#[derive(Debug, Clone)]
pub(super) struct Saved {
    pub(super) backend: &'static str,
    pub(super) pickle: Bytes,
    /// Names of variables that could not be saved.
    pub(super) unsaved: Vec<String>,
    /// Cells that the session has run.
    pub(super) cells: u64,
}

impl SnapshotData for Saved {
    fn backend(&self) -> &'static str {
        self.backend
    }

    fn unsaved(&self) -> &[String] {
        &self.unsaved
    }

    fn save(&self, path: &Path) -> Result<u64> {
        if path.exists() && !path.is_file() {
            let what = format!("the snapshot {}", path.display());
            return Err(Error::invalid(what, "there is something at this path that is no file"));
        }
        let io = |e| Error::io(format!("writing the snapshot {}", path.display()), e);
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // Private to the user, and complete when it appears.
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        file.write_all(&self.pickle).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(path).map_err(|e| io(e.error))?;
        Ok(self.pickle.len() as u64)
    }
}

/// Reads a snapshot of sessions of `backend`, which is another's of processes just as well.
///
/// # Errors
///
/// [`Error::Io`] when it can't be read, [`Error::Incompatible`] when it is no pickle,
/// [`Error::Invalid`] when it's longer than any session could have made it.
pub(super) fn load(backend: &'static str, path: &Path) -> Result<Saved> {
    let what = || format!("the snapshot {}", path.display());
    let io = |e| Error::io(format!("reading {}", what()), e);
    let mut file = File::open(path).map_err(io)?.take(CALL_BYTES_MAX as u64 + 1);
    let mut pickle = Vec::new();
    file.read_to_end(&mut pickle).map_err(io)?;
    if pickle.len() > CALL_BYTES_MAX {
        return Err(Error::invalid(what(), format!("it has more than {CALL_BYTES_MAX} bytes")));
    }
    if pickle.first() != Some(&PICKLE) {
        return Err(Error::Incompatible {
            what: what(),
            expected: format!("a pickle of dill, as a session of the {backend} backend saves it"),
            found: "something else".into(),
        });
    }
    Ok(Saved { backend, pickle: pickle.into(), unsaved: Vec::new(), cells: 0 })
}
