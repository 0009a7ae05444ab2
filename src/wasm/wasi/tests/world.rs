//! Directories of a host as hostile machine code finds them: its own and a mount, with good paths in them,
//! and bait beside them, which every function could reach if nothing kept it from that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, FileType};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use tempfile::TempDir;

/// What is in the bait, and a name and a link's target there; nothing that a guest may see has it.
const MARK: &str = "kaa-mark";
/// When all bait was changed last, in nanoseconds: to look at it is to see this.
const MARK_NS: u64 = 1_234_567_898_765_432_109;

/// Good paths in the mount and in the scratch, or by way of `/`, by what is there.
pub(super) const ROLES: &[(&str, &[&str])] = &[
    ("empty", &["empty", "./empty", "data/empty"]),
    ("file", &["f", "./f", "d/g", "d/../f", "data/f"]),
    ("link", &["link", "data/link"]),
    ("new", &["new", "d/new", "data/new"]),
];
/// The part of those that lead out.
pub(super) const OUT: &str = "out";
/// Directories.
const MORE: &[&str] = &["d", ".", "data"];
/// Those that lead out from every directory, also by links that lie there.
const OUTSIDE: &[&str] = &[
    "../bait/secret",
    "../bait",
    "../bait/inner",
    "../bait/new",
    "../bait/link",
    "d/../../bait/secret",
    "d/../../bait/new",
    "up/secret",
    "up/new",
    "up/inner",
    "up/link",
    "out",
    "data/../bait/secret",
    "data/up/new",
    "..",
    "/",
    "HOST/bait/secret",
    "../../../../../../../../../../HOST/bait/secret",
];
const ODD: &[&[u8]] = &[b"", b"\xff\xfe", b"f\0g", b"../bait/secret\0"];

/// What lies in a directory of the guest's own.
enum Laid {
    Directory,
    File(&'static str),
    Link(&'static str),
}
use Laid::{Directory, File as Text, Link};

const LAID: &[(&str, Laid)] = &[
    ("d", Directory),
    ("d/g", Text("good")),
    ("empty", Directory),
    ("f", Text("good")),
    ("link", Link("f")),
    ("out", Link("../bait/secret")),
    ("up", Link("../bait")),
];
/// The directories in which a guest may do as it likes.
const OWN: [&str; 2] = ["scratch", "mount"];

pub(super) struct World {
    host: TempDir,
    untouchable: Listing,
}

impl World {
    pub(super) fn new() -> Self {
        let host = tempfile::tempdir().unwrap();
        let mut world = Self { host, untouchable: Listing::new() };
        let at = |path: &str| world.path().join(path);
        for directory in ["lib", "empty", "bait", "bait/inner"] {
            fs::create_dir(at(directory)).unwrap();
        }
        fs::write(at("lib/zip"), "library").unwrap();
        fs::write(at("bait/secret"), MARK).unwrap();
        fs::write(at("bait").join(MARK), "").unwrap();
        symlink(MARK, at("bait/link")).unwrap();
        let then = UNIX_EPOCH + Duration::from_nanos(MARK_NS);
        for path in ["bait/secret", "bait/inner", "bait"] {
            File::open(at(path)).unwrap().set_modified(then).unwrap();
        }
        for own in OWN {
            fs::create_dir(at(own)).unwrap();
            lay(&at(own));
        }
        world.untouchable = world.look();
        world
    }

    pub(super) fn path(&self) -> &Path {
        self.host.path()
    }

    /// Makes the directories of the guest anew that it has changed.
    pub(super) fn mend(&self) {
        for own in OWN.iter().map(|own| self.path().join(own)) {
            let found = listing(&own, &[]);
            let is_there = |(path, laid): &(&str, Laid)| {
                found.get(&own.join(path)).is_some_and(|found| laid.is(found))
            };
            if found.len() != LAID.len() + 1 || !LAID.iter().all(is_there) {
                clear(&own);
                lay(&own);
            }
        }
    }

    /// All that no guest may change, and what there is beside it.
    fn look(&self) -> Listing {
        listing(self.path(), &OWN.map(|own| self.path().join(own)))
    }

    /// The paths that are not as they were.
    pub(super) fn harm(&self) -> Vec<PathBuf> {
        let (before, after) = (&self.untouchable, self.look());
        let paths = before.keys().chain(after.keys());
        let changed = paths.filter(|path| before.get(*path) != after.get(*path));
        changed.cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }

    pub(super) fn paths(&self) -> Vec<NamedPath> {
        let host = self.path().to_str().unwrap();
        let plain = |path: &&str| path.replace("HOST", host).into_bytes();
        let odd = ODD.iter().map(|path| path.to_vec());
        let others = MORE.iter().map(plain).chain(odd).map(|bytes| NamedPath { role: "", bytes });
        let outside = OUTSIDE.iter().map(plain).map(|bytes| NamedPath { role: OUT, bytes });
        let roles = ROLES.iter().flat_map(|(role, paths)| {
            paths.iter().map(|path| NamedPath { role, bytes: path.as_bytes().to_vec() })
        });
        roles.chain(outside).chain(others).collect()
    }
}

impl Laid {
    fn is(&self, found: &Found) -> bool {
        let Some(kind) = found.kind else { return false };
        match self {
            Directory => kind.is_dir(),
            Text(text) => kind.is_file() && found.content[LENGTH..] == *text.as_bytes(),
            Link(target) => kind.is_symlink() && found.content == target.as_bytes(),
        }
    }
}

fn lay(own: &Path) {
    for (path, laid) in LAID {
        let at = own.join(path);
        match laid {
            Directory => fs::create_dir(at),
            Text(text) => fs::write(at, text),
            Link(target) => symlink(target, at),
        }
        .unwrap();
    }
}

/// Removes what is in a directory, which stays.
fn clear(own: &Path) {
    for entry in fs::read_dir(own).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => fs::remove_dir_all(entry.path()).unwrap(),
            false => fs::remove_file(entry.path()).unwrap(),
        }
    }
}

/// A path for the guest to name, with its part, of [`ROLES`] or [`OUT`], if it has one.
pub(super) struct NamedPath {
    pub(super) role: &'static str,
    pub(super) bytes: Vec<u8>,
}

/// Whether anything of the bait is in these bytes.
pub(super) fn is_bait(bytes: &[u8]) -> bool {
    [MARK.as_bytes(), &MARK_NS.to_le_bytes()].into_iter().any(|mark| {
        let mut starts = bytes.iter().enumerate().filter(|(_, byte)| **byte == mark[0]);
        starts.any(|(at, _)| bytes[at..].starts_with(mark))
    })
}

type Listing = BTreeMap<PathBuf, Found>;

/// What a path is: enough to see any change of it.
#[derive(Debug, PartialEq, Eq, Default)]
struct Found {
    kind: Option<FileType>,
    mode: u32,
    links: u64,
    modified: (i64, i64),
    /// Of a file its length in so many bytes, and its beginning; of a link its target.
    content: Vec<u8>,
}
const LENGTH: usize = 8;
const READ_MAX: u64 = 4096;

/// Everything below a directory, and itself; of these `closed` ones only that they are there.
fn listing(root: &Path, closed: &[PathBuf]) -> Listing {
    let mut all = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        if closed.contains(&path) {
            all.insert(path, Found::default());
            continue;
        }
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = if metadata.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else if metadata.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else {
            // A guest's file may be nearly all hole.
            let mut content = metadata.len().to_le_bytes().to_vec();
            File::open(&path).unwrap().take(READ_MAX).read_to_end(&mut content).unwrap();
            content
        };
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        let (kind, mode, links) = (Some(metadata.file_type()), metadata.mode(), metadata.nlink());
        all.insert(path, Found { kind, mode, links, modified, content });
    }
    all
}
