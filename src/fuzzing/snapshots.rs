//! The format of snapshots, without a file.

use crate::error::Result;
use crate::limits::Limits;
use crate::snapshot::SnapshotHeader;
use crate::snapshot::format::{self, Bounds, SavedFile, Sink, Writer};

/// What was read of a snapshot.
#[derive(Debug, PartialEq, Eq)]
pub struct Contents {
    /// What it says about itself.
    pub header: SnapshotHeader,
    /// The number of a page, and the bytes of it and of those that follow it.
    pub pages: Vec<(u32, Vec<u8>)>,
    files: Vec<SavedFile>,
}

/// Reads a snapshot for sessions with these limits.
///
/// # Errors
///
/// [`Error::Incompatible`](crate::Error::Incompatible) for what is none.
pub fn read_snapshot(bytes: &[u8], limits: &Limits, files: u64) -> Result<Contents> {
    let (memory_bytes, file_bytes) = (limits.memory_bytes, limits.disk_bytes);
    let bounds = Bounds { memory_bytes, file_bytes, files };
    let mut read = Read::default();
    let header = format::read(bytes, &bounds, |_| Ok(()), &mut read)?;
    Ok(Contents { header, pages: read.pages, files: read.files })
}

impl Contents {
    /// The same as a file of Kaa's own.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for what the format can't hold.
    pub fn write(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new(Vec::new(), &self.header)?;
        self.pages.iter().try_for_each(|(first, bytes)| writer.pages(*first, bytes))?;
        self.files.iter().try_for_each(|file| writer.file(file))?;
        writer.finish()
    }

    /// The paths in the scratch directory, and where those that are links lead.
    pub fn paths(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.files.iter().map(|file| match file {
            SavedFile::Directory { path } | SavedFile::File { path, .. } => (&path[..], None),
            SavedFile::Link { path, target } => (&path[..], Some(&target[..])),
        })
    }

    /// Bytes of all files.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        let bytes = |file: &SavedFile| match file {
            SavedFile::File { bytes, .. } => bytes.len() as u64,
            SavedFile::Directory { .. } | SavedFile::Link { .. } => 0,
        };
        self.files.iter().map(bytes).sum()
    }
}

#[derive(Default)]
struct Read {
    pages: Vec<(u32, Vec<u8>)>,
    files: Vec<SavedFile>,
}

impl Sink for Read {
    fn pages(&mut self, first_page: u32, bytes: &[u8]) -> Result<()> {
        self.pages.push((first_page, bytes.to_vec()));
        Ok(())
    }

    fn file(&mut self, file: SavedFile) -> Result<()> {
        self.files.push(file);
        Ok(())
    }
}
