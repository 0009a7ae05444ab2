//! Files of the store: private to their owner, checked before they are read, hashed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FORMAT, FileRecord, MANIFEST_BYTES_MAX};
use crate::error::{Error, Result};

/// Checks that a file or directory is the user's own and closed to others.
pub(super) fn check_private(path: &Path, directory: bool) -> Result<fs::Metadata> {
    let metadata = fs::symlink_metadata(path)
        .map_err(|e| Error::io(format!("looking at {}", path.display()), e))?;
    let refuse = |expected: &str, found: String| {
        let (what, expected) = (path.display().to_string(), expected.to_owned());
        Err(Error::Incompatible { what, expected, found })
    };
    if metadata.is_dir() != directory || metadata.is_symlink() {
        return refuse(
            if directory { "a directory" } else { "a regular file" },
            format!("{:?}", metadata.file_type()),
        );
    }
    let user = rustix::process::geteuid().as_raw();
    if metadata.uid() != user {
        return refuse(&format!("owner {user}"), format!("owner {}", metadata.uid()));
    }
    if metadata.mode() & 0o077 != 0 {
        let found = format!("mode {:o}; close it with chmod go-rwx", metadata.mode() & 0o777);
        return refuse("no access for others", found);
    }
    Ok(metadata)
}

/// The cheap checks of an entry's files: there, regular, private, of the recorded size.
pub(crate) fn check_files(place: &Path, files: &[FileRecord]) -> Result<()> {
    check_private(place, true)?;
    for record in files {
        let path = place.join(&record.path);
        let metadata = check_private(&path, false)?;
        if metadata.len() != record.bytes {
            return Err(Error::Incompatible {
                what: format!("the file {}", path.display()),
                expected: format!("{} bytes", record.bytes),
                found: format!("{} bytes", metadata.len()),
            });
        }
    }
    Ok(())
}

/// Reads a manifest after checking that it's private.
pub(crate) fn read_manifest<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    check_private(path, false)?;
    let text = read_small(path, MANIFEST_BYTES_MAX)
        .map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
    serde_json::from_str(&text).map_err(|e| Error::Incompatible {
        what: path.display().to_string(),
        expected: format!("a manifest of format {FORMAT}"),
        found: e.to_string(),
    })
}

pub(super) fn read_small(path: &Path, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(bytes_max).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a manifest that only its owner can read.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).expect("a manifest has only text keys");
    write_private(path, &text).map_err(|e| Error::io(format!("writing {}", path.display()), e))
}

/// Writes a new file that only its owner can read.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create_private(path)?.write_all(bytes)
}

/// A new file that only its owner can read.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).read(true).create_new(true).mode(0o600).open(path)
}

impl FileRecord {
    /// Reads and hashes a file of an entry.
    pub(crate) fn of(place: &Path, path: &str) -> Result<Self> {
        let full = place.join(path);
        let context = || format!("reading {}", full.display());
        let mut file = File::open(&full).map_err(|e| Error::io(context(), e))?;
        let (sha256, bytes) = hash(&mut file, |_| {}).map_err(|e| Error::io(context(), e))?;
        Ok(Self { path: path.to_owned(), bytes, sha256 })
    }
}

/// SHA-256 in hexadecimal, and the number of bytes.
pub(crate) fn hash(reader: &mut impl Read, advance: impl Fn(u64)) -> io::Result<(String, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = reader.read(&mut buffer)?;
        if read == 0 {
            return Ok((hex(&hasher.finalize()), bytes));
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
        advance(bytes);
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Flushes every file and directory below `path`.
pub(super) fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()
}

/// Bytes of all files below `path`.
pub(super) fn tree_bytes(path: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { tree_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

/// Whether a file or directory was last changed longer ago than that.
pub(crate) fn is_older_than(path: &Path, age: Duration) -> bool {
    let changed = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|elapsed| elapsed > age))
}
