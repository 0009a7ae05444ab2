//! Hibernation: a session that is only a file, and what it shares with others.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;

use super::Image;
use super::memory::{RESERVATION, Run};
use super::opening::Shared;
use super::saved::{Loading, Saved};
use crate::error::{Error, Result};
use crate::image::create_private;
use crate::snapshot::format::{self, Bounds};

/// A session without memory. The file goes with it.
pub(crate) struct Asleep {
    path: PathBuf,
    bytes: u64,
    /// What a template or another fork has anyway.
    shared: Vec<Run>,
}

impl Asleep {
    /// Writes a session to a file of this process, but the runs `shared`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no room for it.
    pub(crate) fn new(host: &Shared, saved: &Saved, shared: Vec<Run>) -> Result<Self> {
        let path = host.scratches()?.path();
        let context = || format!("writing a hibernated session to {}", path.display());
        let file = create_private(&path).map_err(|e| Error::io(context(), e))?;
        let mut asleep = Self { path: path.clone(), bytes: 0, shared };
        let mut base = saved.base();
        asleep.shared.iter().for_each(|run| base.lay(run.clone()));
        let file = saved.write(BufWriter::new(file), &base)?;
        let file = file.into_inner().map_err(|e| Error::io(context(), e.into_error()))?;
        asleep.bytes = file.metadata().map_err(|e| Error::io(context(), e))?.len();
        Ok(asleep)
    }

    /// Size of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The session as it was.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file can't be read, [`Error::Incompatible`] when it is damaged.
    pub(crate) fn read(&self, image: &Image) -> Result<Saved> {
        let context = || format!("reading a hibernated session from {}", self.path.display());
        let file = File::open(&self.path).map_err(|e| Error::io(context(), e))?;
        let bounds =
            Bounds { memory_bytes: RESERVATION as u64, file_bytes: u64::MAX, files: u64::MAX };
        let mut loading = Loading::default();
        let header = format::read(file, &bounds, |_| Ok(()), &mut loading)?;
        let state = loading.state(&image.0.start, &header, &self.shared)?;
        Ok(Saved::new(image.clone(), state, header.session, loading.files.into()))
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        // What resists goes with the directory of the process.
        let _ = fs::remove_file(&self.path);
    }
}
