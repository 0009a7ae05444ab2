//! The file of a session snapshot: what differs from the image that the session started from.
//!
//! Integers are little-endian. Lengths are in bytes.
//!
//! ```text
//! offset   length
//! 0        8       magic: "KAASNAP\0"
//! 8        4       format version: 1
//! 12       4       n, the length of the header: 1 to 1 MiB
//! 16       n       header: `SnapshotHeader` as JSON
//! 16 + n   32      SHA-256 of all bytes before it
//! 48 + n   ...     chunks: those of pages, then those of files, then the end
//!          32      SHA-256 of all bytes before it
//! ```
//!
//! Nothing follows. A chunk is 16 bytes and its stored bytes:
//!
//! ```text
//! offset   length
//! 0        1       kind
//! 1        1       encoding
//! 2        2       zero
//! 4        4       at: depends on the kind
//! 8        4       length of what it holds, decoded: at most 1 MiB
//! 12       4       length of what is stored
//! 16       ...     what is stored
//!
//! encoding         what is stored
//! 0  zeros         nothing: everything it holds is zero
//! 1  raw           what it holds
//! 2  lz4           an LZ4 block, shorter than what it holds and decoding to exactly that
//!
//! kind             at               what it holds                              encoding
//! 0  end           0                nothing                                    zeros
//! 1  pages         the first page   1 to 256 pages of 4096 bytes               any
//! 2  directory     length of path   path                                       raw
//! 3  file          length of path   path, u64 length of the file               raw
//! 4  link          length of path   path, target                               raw
//! 5  data          0                the next part of the file before it        any
//! ```
//!
//! - Pages ascend and lie within the memory. Pages that aren't there are those of the image.
//! - A file is followed by its data, in parts of 1 MiB and a rest; an empty file has none.
//! - Paths are relative to the scratch directory: UTF-8 of at most 1024 bytes in at most 64 names of
//!   at most 255, separated by `/`; no name is empty, `.` or `..`, none holds a NUL. A name that
//!   isn't UTF-8 can't be saved. No path comes twice, and what it lies in came before it, as a
//!   directory.
//! - The target of a link is such a path too, but it may hold `.` and begin with `..`, as often as
//!   there are directories above the link. With links like this alone, none leads out of the scratch
//!   directory, whichever others it passes.
//! - The header counts pages, files of all kinds, and bytes of files; the counts have to come true.
//!
//! **Versions.** Whatever changes the meaning of a file that was valid, or makes files that older
//! readers would misread, raises the format version; a reader refuses versions above its own. So a
//! key of the header that a reader doesn't know is one it may ignore, and it does. A key that is
//! missing is refused, also one that may be `null`.
//!
//! **Safety.** Files are read as if they were hostile. Every length is compared with its maximum, and
//! the header's sums with the caller's [`Bounds`], before anything of that size is allocated: reading
//! takes a few MiB, the largest file within the bounds, and the paths of the files. The checksums
//! guard against accidents only, since whoever writes a file can compute them. The [`Sink`] gets pages
//! and files before the last checksum was compared: after an error, it has to be thrown away.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::image::GlobalRecord;

mod check;
mod chunk;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub(crate) use read::{read, read_header};
pub(crate) use write::Writer;

/// The unit in which memory is saved.
pub(crate) const PAGE: usize = 4096;

const MAGIC: [u8; 8] = *b"KAASNAP\0";
const FORMAT: u32 = 1;
/// Enough for thousands of environment variables, tools and imports.
const HEADER_BYTES_MAX: usize = 1 << 20;
const DIGEST_BYTES: usize = 32;

/// What a snapshot says about itself: all but the memory's pages and the files.
///
/// Nothing in a snapshot is trusted. Its memory, globals and files are the guest's, and as with
/// anything of the guest, whatever they hold stays within the sandbox; whoever can write the file
/// decides what the guest's code does next, so treat a snapshot of unknown origin like code of
/// unknown origin. What the guest may reach and use up comes from the limits and the policy of the
/// session that loads it, never from the file. The checksums find accidents, they don't prove who
/// wrote it. The texts here are those of the file: escape them before a terminal sees them. The file
/// isn't encrypted: the environment variables and all that the guest held in memory can be read from
/// it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotHeader {
    /// Version of the Kaa that wrote it; only shown.
    pub kaa: String,
    /// Python of the guest, such as `3.15.0`.
    pub python: String,
    /// The image that the session started from.
    pub image: SnapshotImage,
    /// Digest of the guest's rewritten code: what the memory means.
    pub module: String,
    /// Bytes of the linear memory.
    pub memory_bytes: u64,
    pub(crate) globals: Vec<GlobalRecord>,
    /// What the host kept about the session.
    pub session: SessionRecord,
    /// Pages of 4096 bytes in the file.
    pub pages: u64,
    /// Files, directories and links in the file.
    pub files: u64,
    /// Bytes of all files.
    pub file_bytes: u64,
}

/// The image that a snapshot builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotImage {
    /// The name it was opened under.
    pub name: String,
    /// Its key.
    pub key: String,
    /// SHA-256 of its memory.
    pub memory_sha256: String,
}

/// What the host kept about a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Cells that were run.
    pub cells: u64,
    /// What the guest was told about its surroundings; none before the first cell.
    #[serde(deserialize_with = "present")]
    pub told: Option<Told>,
    /// Seed of its randomness.
    #[serde(deserialize_with = "present")]
    pub seed: Option<u64>,
    /// Random bytes that it drew from the seed.
    pub random_bytes: u64,
    /// Its clock, when that isn't the host's.
    #[serde(deserialize_with = "present")]
    pub clock: Option<ClockRecord>,
    /// Bytes that were ever written to its mounts.
    pub mount_bytes: u64,
}

/// What the guest was told about its surroundings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The profile's name.
    pub profile: String,
    /// Whether there are language models.
    pub lm: bool,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Modules that cells may import; none means all.
    #[serde(deserialize_with = "present")]
    pub allowed_imports: Option<Vec<String>>,
    /// Names of the host's tools.
    pub tools: Vec<String>,
}

/// Where a clock of the session's own stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockRecord {
    /// Nanoseconds since 1970 at which it started.
    pub start_ns: u64,
    /// Nanoseconds by which it moved since.
    pub elapsed_ns: u64,
}

/// Something in the scratch directory; its path is relative to that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SavedFile {
    Directory { path: String },
    File { path: String, bytes: Vec<u8> },
    Link { path: String, target: String },
}

/// What a session can take; a snapshot with more is refused before it's read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) memory_bytes: u64,
    pub(crate) file_bytes: u64,
    /// Files, directories and links.
    pub(crate) files: u64,
}

/// Takes what is read. What it got is worth nothing until [`read`] has returned without an error.
pub(crate) trait Sink {
    /// Pages that follow each other: a multiple of [`PAGE`] bytes, at most 1 MiB.
    fn pages(&mut self, first_page: u32, bytes: &[u8]) -> Result<()>;
    fn file(&mut self, file: SavedFile) -> Result<()>;
}

impl Bounds {
    fn check(&self, header: &SnapshotHeader) -> Result<()> {
        let Self { memory_bytes, file_bytes, files } = *self;
        for (found, most, of, limit) in [
            (header.memory_bytes, memory_bytes, "bytes of memory", "limit `memory_bytes`"),
            (header.file_bytes, file_bytes, "bytes of files", "limit `disk_bytes`"),
            (header.files, files, "files, directories and links", "limit of files"),
        ] {
            if found > most {
                return Err(incompatible(
                    format!("at most {most} {of}, the session's {limit}"),
                    format!("{found}; raise that limit to load it"),
                ));
            }
        }
        Ok(())
    }
}

/// Takes `null` for none, but not a missing key, which serde would by itself.
fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer)
}

fn incompatible(expected: impl Into<String>, found: impl Into<String>) -> Error {
    let what = "the snapshot".to_owned();
    Error::Incompatible { what, expected: expected.into(), found: found.into() }
}
