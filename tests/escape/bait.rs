//! A directory of the host with two mounts in it, and bait beside them that nobody may read or change.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use kaa::{EnvironmentOptions, Mount, Policy};
use tempfile::TempDir;

/// What all bait begins with, and nothing that a guest may read.
pub(crate) const MARK: &str = "kaa-bait";

/// Links that the host has put into both mounts: name and target.
const LINKS: &[(&str, &str)] = &[
    ("abs", "HOST/bait/secret"),
    ("rel", "../bait/secret"),
    ("up", "../bait"),
    ("chain", "chain2"),
    ("chain2", "up"),
    ("loop", "loop"),
    ("root", "/"),
    ("proc", "/proc/self"),
    ("dangling", "../bait/new"),
    ("sub/up", "../../bait"),
];

pub(crate) struct Bait {
    host: TempDir,
}

impl Bait {
    pub(crate) fn new() -> Self {
        let host = tempfile::tempdir().unwrap();
        let bait = Self { host };
        for directory in ["bait/inner", "bait/empty", "read/sub", "write/sub"] {
            fs::create_dir_all(bait.at(directory)).unwrap();
        }
        for file in ["secret", "bait/secret", "bait/inner/deeper"] {
            fs::write(bait.at(file), format!("{MARK} {file}")).unwrap();
        }
        symlink("secret", bait.at("bait/link")).unwrap();
        let host = bait.host.path().to_str().unwrap();
        for mount in ["read", "write"] {
            fs::write(bait.at(mount).join("plain"), "plain").unwrap();
            for (link, target) in LINKS {
                symlink(target.replace("HOST", host), bait.at(mount).join(link)).unwrap();
            }
        }
        bait
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.host.path().join(path)
    }

    pub(crate) fn host(&self) -> &str {
        self.host.path().to_str().unwrap()
    }

    /// Options of a session with one mount to read, at `/data`, and one to write, at `/output`.
    pub(crate) fn options(&self) -> EnvironmentOptions {
        let mount = |host: &str, guest: &str, writable| Mount {
            host: self.at(host),
            guest: guest.into(),
            writable,
        };
        let mounts = vec![mount("read", "/data", false), mount("write", "/output", true)];
        let policy = Policy { mounts, ..Policy::default() };
        EnvironmentOptions { policy, ..EnvironmentOptions::default() }
    }

    /// All that a session with these options may not change.
    pub(crate) fn untouchable(&self) -> BTreeMap<PathBuf, Found> {
        let mut all = listing(self.host.path());
        let writable = self.at("write");
        all.retain(|path, _| !path.starts_with(&writable) || *path == writable);
        // Its own times and links change with what is made in it.
        all.insert(writable, Found::default());
        all
    }
}

/// What a path is: enough to see any change of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Found {
    inode: u64,
    mode: u32,
    links: u64,
    modified: (i64, i64),
    content: Vec<u8>,
}

/// Everything below a directory, and itself.
pub(crate) fn listing(root: &Path) -> BTreeMap<PathBuf, Found> {
    let mut all = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = if metadata.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else if metadata.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else {
            fs::read(&path).unwrap()
        };
        let found = Found {
            inode: metadata.ino(),
            mode: metadata.mode(),
            links: metadata.nlink(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            content,
        };
        all.insert(path, found);
    }
    all
}
