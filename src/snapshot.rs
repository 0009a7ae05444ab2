//! Snapshots: a session's whole state as a value, and as a file.
//!
//! What a snapshot is made of belongs to its backend; here is what all of them have in common, and
//! the file format of those that are memory pages.

pub(crate) mod format;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

pub use self::format::{ClockRecord, SessionRecord, SnapshotHeader, SnapshotImage, Told};
use crate::error::{Error, Result};

/// The state of a session at one moment. Cheap to clone; it stays as it is, whatever becomes of the
/// session.
///
/// It has everything that is in the guest's memory: variables, generators half-way, patched modules,
/// the state of random generators. It has the files in the scratch directory, but not their times. A
/// session with open files can't be saved. What the session may reach and spend, its tools and its
/// language models are not part of it: they come from the options of the session that goes on
/// from it.
///
/// ```no_run
/// # async fn example(session: &mut kaa::WasmEnvironment) -> kaa::Result<()> {
/// use kaa::{Environment, EnvironmentExt};
///
/// session.execute("squares = (n * n for n in range(10)); next(squares)").await?;
/// let before = session.snapshot().await?;
/// session.execute("squares = None").await?;
/// session.restore(&before).await?;
/// assert_eq!(session.execute("next(squares)").await?.value.as_deref(), Some("1"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Snapshot(Arc<dyn SnapshotData>);

/// What a backend keeps in a [`Snapshot`].
pub trait SnapshotData: Any + Send + Sync {
    /// The backend's name.
    fn backend(&self) -> &'static str;

    /// Names of variables that could not be saved; the first 200 of them.
    fn unsaved(&self) -> &[String] {
        &[]
    }

    /// Writes the snapshot to a new file, private to the user, which replaces one of the same name
    /// when it is complete. Returns its size in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file can't be written, [`Error::Invalid`] when there is something at the
    /// path that isn't a file, [`Error::Unsupported`] when the backend has no file format.
    fn save(&self, path: &Path) -> Result<u64>;
}

impl Snapshot {
    /// A snapshot of a backend.
    pub fn new(data: impl SnapshotData) -> Self {
        Self(Arc::new(data))
    }

    /// The backend's name.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.0.backend()
    }

    /// Names of variables that are not in it, because the backend saves variable by variable and found
    /// no form for these; the first 200 of them. A backend that saves memory has none.
    #[must_use]
    pub fn unsaved(&self) -> &[String] {
        self.0.unsaved()
    }

    /// Writes the snapshot to a file that is private to the user; one of the same name is replaced
    /// when the new one is complete. Returns its size in bytes. Blocks.
    ///
    /// Of the memory, only what differs from the session's image is written, compressed: the file
    /// can be read where the same image is.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file can't be written, [`Error::Invalid`] when there is something at the
    /// path that isn't a file, [`Error::Unsupported`] when the backend has no file format.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<u64> {
        self.0.save(path.as_ref())
    }

    /// What the backend `backend` keeps in it.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when it's another backend's.
    pub fn data<T: SnapshotData>(&self, backend: &'static str) -> Result<&T> {
        let data: &dyn Any = &*self.0;
        data.downcast_ref().ok_or_else(|| Error::Incompatible {
            what: "the snapshot".into(),
            expected: format!("one of the {backend} backend"),
            found: format!("one of the {} backend", self.backend()),
        })
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("backend", &self.backend()).finish_non_exhaustive()
    }
}

/// What a snapshot file says about itself. Reads and checks the header only.
///
/// # Errors
///
/// [`Error::Io`] when it can't be read, [`Error::Incompatible`] when it isn't a snapshot, is damaged
/// in its header, or of a newer format.
pub fn inspect_snapshot(path: impl AsRef<Path>) -> Result<SnapshotHeader> {
    format::read_header(&mut BufReader::new(open(path.as_ref())?))
}

/// Opens a snapshot file.
pub(crate) fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io(format!("opening the snapshot {}", path.display()), e))
}
