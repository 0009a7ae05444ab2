//! Packages from PyPI, installed by pip on the first run into the target directory.

#![allow(dead_code, reason = "every user of this needs a part of it")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What saves the variables of a process.
pub(crate) const DILL: &[&str] = &["dill==0.4.0"];

/// The directory with these packages, installed by `python`'s pip unless an earlier run did. It
/// appears with all in it, or not at all.
pub(crate) fn installed(python: &str, packages: &[&str]) -> Result<PathBuf, String> {
    installed_as(&packages.join("-").replace("==", "-"), python, packages)
}

/// The same, in a directory of this name: the names of many packages are too long for one.
pub(crate) fn installed_as(name: &str, python: &str, packages: &[&str]) -> Result<PathBuf, String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = target.join(name);
    if folder.exists() {
        return Ok(folder);
    }
    let io = |error: std::io::Error| error.to_string();
    let fresh = tempfile::tempdir_in(target).map_err(io)?;
    let output = Command::new(python)
        .args(["-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
        .args(["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--quiet"])
        .args([OsStr::new("--target"), fresh.path().join("packages").as_os_str()])
        .args(packages)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("`{python}` can't be started: {error}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last = words.trim().lines().last().unwrap_or("nothing");
        return Err(format!("`{python} -m pip install` says: {last}"));
    }
    match std::fs::rename(fresh.path().join("packages"), &folder) {
        // When it's there all the same, another run was quicker.
        Err(error) if !folder.exists() => Err(error.to_string()),
        _ => Ok(folder),
    }
}
