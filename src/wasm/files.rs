//! The session's files: its scratch directory with a quota, and the way to its mounts.
//!
//! The guest's C library learned its preopened directories when the image was booted: the standard
//! library, `/tmp`, and an empty `/`. Mounts that a session adds are reached through `/`: a path
//! below it that begins with a mount's guest path goes on in the mount's own directory.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::image::is_older_than;
use crate::snapshot::format::SavedFile;

/// The descriptor of the empty directory `/`, by which mounts are reached. Every session opens the
/// standard library as 3, `/tmp` as 4 and this as 5.
pub(crate) const ROOT_FD: u32 = 5;
const STDLIB_FD: u32 = 3;
const SCRATCH_FD: u32 = 4;
/// The first mount.
pub(crate) const FIRST_MOUNT_FD: u32 = 6;

/// What a new file is charged beyond its bytes.
pub(crate) const FILE_BYTES: u64 = 4 << 10;
/// What a new directory is charged: removing a deep tree costs the host stack.
pub(crate) const DIRECTORY_BYTES: u64 = 64 << 10;

/// Descriptors that a session may have open beside those it starts with.
const OPEN_MAX: usize = 256;

/// Where the scratch directories of one process are. It is locked as long as the process lives, so
/// that leftovers of dead ones can be told apart, also from within another container.
#[derive(Debug)]
pub(crate) struct Scratches {
    directory: TempDir,
    _lock: File,
    next: AtomicU64,
    /// Empty directories that nobody has yet: making one takes longer than a cell.
    ready: Mutex<Vec<PathBuf>>,
}

/// Directories that are made ahead.
const READY: usize = 8;
/// Directories that are younger are left alone: they may not be locked yet.
const LEFTOVER_AGE_MIN: Duration = Duration::from_secs(60);

impl Scratches {
    /// A new directory in `parent`, for scratch directories and what else a process leaves on disk
    /// while it lives. Removes those of dead processes.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be made or locked.
    pub(crate) fn open(parent: &Path) -> Result<Arc<Self>> {
        remove_leftovers(parent);
        let make = || {
            let directory = tempfile::Builder::new().tempdir_in(parent)?;
            let lock = File::open(directory.path())?;
            lock.lock()?;
            let ready = Mutex::default();
            Ok(Self { directory, _lock: lock, next: AtomicU64::new(0), ready })
        };
        make().map(Arc::new).map_err(|e| {
            Error::io(format!("making a scratch directory in {}", parent.display()), e)
        })
    }

    /// A path in it that nobody has.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    fn ready(&self) -> MutexGuard<'_, Vec<PathBuf>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self) -> Result<PathBuf> {
        let path = self.path();
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|e| Error::io(format!("making the scratch directory {}", path.display()), e))?;
        Ok(path)
    }

    /// Makes directories ahead, in the background where there is one.
    fn prepare(self: &Arc<Self>) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let scratches = Arc::clone(self);
        runtime.spawn_blocking(move || {
            while scratches.ready().len() < READY {
                // Whoever needs one next meets the error again.
                let Ok(path) = scratches.make() else { return };
                scratches.ready().push(path);
            }
        });
    }
}

/// The scratch directory of one session, removed with everything in it when it is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    /// Outlives what is in it.
    _parent: Arc<Scratches>,
}

impl Scratch {
    /// A new directory.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be made.
    pub(crate) fn new(parent: &Arc<Scratches>) -> Result<Self> {
        let (ready, left) = {
            let mut ready = parent.ready();
            (ready.pop(), ready.len())
        };
        if left < READY / 2 {
            parent.prepare();
        }
        let path = ready.map_or_else(|| parent.make(), Ok)?;
        Ok(Self { path, _parent: Arc::clone(parent) })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes everything in the directory.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when something resists.
    pub(crate) fn clear(&self) -> Result<()> {
        let clear = || {
            for entry in fs::read_dir(&self.path)? {
                let entry = entry?;
                match entry.file_type()?.is_dir() {
                    true => fs::remove_dir_all(entry.path())?,
                    false => fs::remove_file(entry.path())?,
                }
            }
            Ok(())
        };
        clear().map_err(|e| Error::io(format!("clearing {}", self.path.display()), e))
    }

    /// Removes the directory and reports what resists, which dropping can't.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when something resists.
    pub(crate) fn close(self) -> Result<()> {
        self.remove().map_err(|e| Error::io(format!("removing {}", self.path.display()), e))
    }

    fn remove(&self) -> io::Result<()> {
        // Nearly always it's empty, and then this is one call.
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(_) => fs::remove_dir_all(&self.path),
            done => done,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What resists goes with the parent, or with the next process's look at leftovers.
        let _ = self.remove();
    }
}

/// Removes scratch directories that no living process has locked.
fn remove_leftovers(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let unlocked = File::open(&path).is_ok_and(|directory| directory.try_lock().is_ok());
        if unlocked && is_older_than(&path, LEFTOVER_AGE_MIN) {
            // Somebody else may be removing it too; what stays is found by the next start.
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// A mount as the guest's paths reach it.
#[derive(Debug)]
struct Route {
    /// The guest path without its leading slash.
    path: String,
    fd: u32,
}

/// The account of a session's files.
#[derive(Debug)]
pub(crate) struct Files {
    scratch: PathBuf,
    bytes_max: u64,
    /// At least what the scratch directory holds, since the last count.
    scratch_bytes: u64,
    /// What was ever written to mounts.
    mount_bytes: u64,
    mount_fds: HashSet<u32>,
    /// Descriptors that the guest opened and didn't close, with the guest's paths.
    open: BTreeMap<u32, String>,
    /// Those of them that the checkpoint's memory knows.
    kept: BTreeSet<u32>,
    /// Whether anything but the standard library was ever opened or changed: if not, descriptors and
    /// scratch are as they were when the session began.
    used: bool,
    /// Whether a file was removed while some were open: a removed file keeps its bytes until it's
    /// closed.
    orphans: bool,
    /// The first descriptor that the guest itself can open.
    first_own_fd: u32,
    routes: Vec<Route>,
    /// Where in the guest's memory a `.` stands, the name of a mount's own directory.
    dot: u32,
}

impl Files {
    /// The account of an empty scratch directory and of mounts at these guest paths.
    pub(crate) fn new(scratch: &Path, bytes_max: u64, mounts: &[String], dot: u32) -> Self {
        let mut routes: Vec<Route> = (FIRST_MOUNT_FD..)
            .zip(mounts)
            .map(|(fd, guest)| Route { path: guest.trim_matches('/').to_owned(), fd })
            .collect();
        // The longest path first: a mount may lie inside another.
        routes.sort_by_key(|route| std::cmp::Reverse(route.path.len()));
        Self {
            scratch: scratch.to_owned(),
            bytes_max,
            scratch_bytes: 0,
            mount_bytes: 0,
            mount_fds: routes.iter().map(|route| route.fd).collect(),
            open: BTreeMap::new(),
            kept: BTreeSet::new(),
            used: false,
            orphans: false,
            first_own_fd: FIRST_MOUNT_FD + mounts.len() as u32,
            routes,
            dot,
        }
    }

    /// Makes room for `bytes` more through descriptor `fd`; `false` is "no space left".
    pub(crate) fn reserve(&mut self, fd: u32, bytes: u64) -> bool {
        self.used = true;
        let wanted = |files: &Self| {
            files.scratch_bytes.saturating_add(files.mount_bytes).saturating_add(bytes)
        };
        if bytes > self.bytes_max {
            return false;
        }
        if wanted(self) > self.bytes_max {
            // The account only grows while the guest also removes and overwrites: count anew, unless
            // there may be files that nothing lists any more.
            if !self.orphans {
                self.scratch_bytes = used_bytes(&self.scratch).unwrap_or(self.scratch_bytes);
            }
            if wanted(self) > self.bytes_max {
                return false;
            }
        }
        if self.mount_fds.contains(&fd) {
            self.mount_bytes = self.mount_bytes.saturating_add(bytes);
        } else {
            self.scratch_bytes = self.scratch_bytes.saturating_add(bytes);
        }
        true
    }

    /// Whether the guest may open one more: descriptors are the host's, and shared by all sessions.
    pub(crate) fn may_open(&self) -> bool {
        self.open.len() < OPEN_MAX
    }

    /// Notes that `opened` was opened through `directory`.
    pub(crate) fn opened(&mut self, directory: u32, opened: u32, path: String) {
        self.open.insert(opened, path);
        self.used |= directory != STDLIB_FD;
        if self.mount_fds.contains(&directory) {
            self.mount_fds.insert(opened);
        } else {
            self.mount_fds.remove(&opened);
        }
    }

    /// The guest's paths of what it has open.
    pub(crate) fn open_paths(&self) -> impl Iterator<Item = &str> {
        self.open.values().map(String::as_str)
    }

    /// All descriptors that the guest has opened.
    pub(crate) fn open_fds(&self) -> Vec<u32> {
        self.open.keys().copied().collect()
    }

    /// The guest's name of a descriptor that its session started with, or that it opened.
    pub(crate) fn directory_path(&self, fd: u32) -> String {
        match fd {
            STDLIB_FD => "/usr/local/lib".into(),
            SCRATCH_FD => "/tmp".into(),
            ROOT_FD => String::new(),
            _ => match self.routes.iter().find(|route| route.fd == fd) {
                Some(route) => format!("/{}", route.path),
                None => self.open.get(&fd).cloned().unwrap_or_default(),
            },
        }
    }

    /// Whether descriptors and scratch are as they were when the session began.
    pub(crate) fn is_unused(&self) -> bool {
        !self.used && self.open.is_empty()
    }

    /// What was ever written to mounts, in bytes.
    pub(crate) fn mount_bytes(&self) -> u64 {
        self.mount_bytes
    }

    /// Goes on with the account of a session that was saved.
    pub(crate) fn resume(&mut self, mount_bytes: u64) {
        self.mount_bytes = self.mount_bytes.max(mount_bytes);
        self.scratch_bytes = used_bytes(&self.scratch).unwrap_or(self.bytes_max);
        self.used |= self.scratch_bytes > 0;
    }

    /// Whether a descriptor is the guest's own, and not one that every session starts with: those
    /// stay, since a session that is rolled back counts on them.
    pub(crate) fn is_own(&self, fd: u32) -> bool {
        fd >= self.first_own_fd
    }

    /// Notes that the guest closed a descriptor of its own.
    pub(crate) fn closed(&mut self, fd: u32) {
        self.open.remove(&fd);
        self.mount_fds.remove(&fd);
        self.orphans &= !self.open.is_empty();
    }

    /// Notes that the guest gave a descriptor another number.
    pub(crate) fn renumbered(&mut self, from: u32, to: u32) {
        let is_mount = self.mount_fds.contains(&from);
        let path = self.open.get(&from).cloned().unwrap_or_default();
        self.closed(from);
        self.open.insert(to, path);
        if is_mount {
            self.mount_fds.insert(to);
        }
    }

    /// Notes that a checkpoint is taken.
    pub(crate) fn keep(&mut self) {
        if !self.open.is_empty() || !self.kept.is_empty() {
            self.kept = self.open.keys().copied().collect();
        }
    }

    /// The descriptors that were opened since the last checkpoint.
    pub(crate) fn since_checkpoint(&self) -> Vec<u32> {
        self.open.keys().filter(|fd| !self.kept.contains(fd)).copied().collect()
    }

    /// Notes that a name was removed or replaced.
    pub(crate) fn removed(&mut self) {
        self.used = true;
        self.orphans |= !self.open.is_empty();
    }

    /// Whether a descriptor leads into a mount.
    pub(crate) fn is_mount(&self, fd: u32) -> bool {
        self.mount_fds.contains(&fd)
    }

    /// What the scratch directory may hold, in bytes.
    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Whether two directories are charged differently: nothing may move between them.
    pub(crate) fn are_apart(&self, one: u32, other: u32) -> bool {
        self.is_mount(one) != self.is_mount(other)
    }

    /// Where a path goes on: descriptor, and address and length of the rest of the path.
    pub(crate) fn route(&self, fd: u32, path: &[u8], ptr: u32) -> (u32, u32, u32) {
        let here = (fd, ptr, path.len() as u32);
        if fd != ROOT_FD {
            return here;
        }
        let mut rest = path;
        while let Some(shorter) = rest.strip_prefix(b"./").or_else(|| rest.strip_prefix(b"/")) {
            rest = shorter;
        }
        for route in &self.routes {
            let Some(inner) = rest.strip_prefix(route.path.as_bytes()) else { continue };
            let inner = match inner {
                [] => inner,
                [b'/', inner @ ..] => inner,
                _ => continue,
            };
            if inner.iter().all(|byte| *byte == b'/') {
                return (route.fd, self.dot, 1);
            }
            return (route.fd, ptr + (path.len() - inner.len()) as u32, inner.len() as u32);
        }
        here
    }
}

/// What is in a directory, parents before children, in a fixed order.
///
/// # Errors
///
/// [`Error::Invalid`] for a name that isn't UTF-8, and for more than `bytes_max` bytes: a file with holes
/// is longer than what it takes on the disk. [`Error::Io`] for what can't be read.
pub(crate) fn read_tree(root: &Path, bytes_max: u64) -> Result<Vec<SavedFile>> {
    let mut files = Vec::new();
    let mut room = bytes_max;
    let mut pending = vec![(root.to_owned(), String::new())];
    while let Some((directory, prefix)) = pending.pop() {
        let context = |e| Error::io("reading the session's files", e);
        let entries: io::Result<Vec<_>> = fs::read_dir(&directory).map_err(context)?.collect();
        let mut entries = entries.map_err(context)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let unnamed = |name: &std::ffi::OsStr| {
                let name = name.display();
                let reason = format!("`/tmp/{prefix}{name}` can't be saved: no name in UTF-8");
                Error::invalid("snapshot", reason)
            };
            let name = entry.file_name().into_string().map_err(|name| unnamed(&name))?;
            let path = format!("{prefix}{name}");
            let kind = entry.file_type().map_err(context)?;
            files.push(if kind.is_dir() {
                pending.push((entry.path(), format!("{path}/")));
                SavedFile::Directory { path }
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).map_err(context)?;
                let target = target.into_os_string().into_string();
                SavedFile::Link { path, target: target.map_err(|name| unnamed(&name))? }
            } else {
                let bytes = read_at_most(&entry.path(), room).map_err(context)?;
                let bytes = bytes.ok_or_else(|| {
                    let reason = format!(
                        "with `/tmp/{path}` the session's files are longer than limits.disk_bytes, \
                         {bytes_max} bytes"
                    );
                    Error::invalid("snapshot", reason)
                })?;
                room -= bytes.len() as u64;
                SavedFile::File { path, bytes }
            });
        }
    }
    Ok(files)
}

/// A file, unless it's longer.
fn read_at_most(path: &Path, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(Some(bytes).filter(|bytes| bytes.len() as u64 <= bytes_max))
}

/// What a directory tree takes on the disk, charged as [`Files::reserve`] charges it.
fn used_bytes(directory: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;

    let mut bytes = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                bytes += DIRECTORY_BYTES;
                pending.push(entry.path());
            } else {
                bytes += FILE_BYTES + metadata.blocks() * 512;
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_the_root_go_on_in_the_mount() {
        let mounts = ["/data".to_owned(), "/data/inner/".to_owned()];
        let files = Files::new(Path::new("/nowhere"), 0, &mounts, 77);
        let cases: &[(u32, &str, (u32, u32, u32))] = &[
            (ROOT_FD, "data/a.txt", (6, 105, 5)),
            (ROOT_FD, "./data//a.txt", (6, 107, 6)),
            (ROOT_FD, "data", (6, 77, 1)),
            (ROOT_FD, "data/", (6, 77, 1)),
            (ROOT_FD, "data/inner/b", (7, 111, 1)),
            (ROOT_FD, "database", (ROOT_FD, 100, 8)),
            (ROOT_FD, "../data/a", (ROOT_FD, 100, 9)),
            (ROOT_FD, "", (ROOT_FD, 100, 0)),
            (4, "data/a", (4, 100, 6)),
        ];
        for (fd, path, expected) in cases {
            assert_eq!(files.route(*fd, path.as_bytes(), 100), *expected, "{path}");
        }
    }

    #[test]
    fn the_quota_counts_anew_before_it_refuses() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(&Scratches::open(parent.path()).unwrap()).unwrap();
        let mut files = Files::new(scratch.path(), 100_000, &[], 0);
        assert!(files.reserve(9, 90_000));
        // Nothing was really written: the next reservation finds the directory empty.
        assert!(files.reserve(9, 90_000));
        fs::write(scratch.path().join("f"), vec![1; 80_000]).unwrap();
        assert!(!files.reserve(9, 90_000));
        fs::remove_file(scratch.path().join("f")).unwrap();
        assert!(files.reserve(9, 90_000));
    }

    #[test]
    fn removed_files_that_are_open_still_count() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(&Scratches::open(parent.path()).unwrap()).unwrap();
        let mut files = Files::new(scratch.path(), 100_000, &[], 0);
        files.opened(4, 9, "/tmp/f".into());
        files.removed();
        assert!(files.reserve(9, 90_000));
        assert!(!files.reserve(9, 90_000));
        files.closed(9);
        assert!(files.reserve(9, 90_000));
    }

    #[test]
    fn leftovers_that_nobody_has_locked_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let old = |path: &Path| {
            let long_ago = std::time::SystemTime::now() - 2 * LEFTOVER_AGE_MIN;
            File::open(path).unwrap().set_modified(long_ago).unwrap();
        };
        let (dead, young) = (parent.path().join("dead"), parent.path().join("young"));
        let alive = Scratches::open(parent.path()).unwrap();
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&young).unwrap();
        old(&dead);
        old(alive.directory.path());
        remove_leftovers(parent.path());
        assert!(!dead.exists() && young.exists() && alive.directory.path().exists());
    }
}
