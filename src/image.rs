//! Images on disk: what they are named by, and the store that keeps them.
//!
//! ```text
//! ROOT/                  0700, owned by the user
//!   modules/KEY/         module.json, python.cwasm, memory.bin, lib/python315.zip
//!   images/KEY/          image.json, memory.bin, site/
//!   names/NAME           the key of the image that NAME stands for
//!   scratch/             the sessions' scratch directories
//!   empty/               what sessions see as `/`
//!   tmp/                 entries that are being written
//!   lock                 held by a process that builds
//! ```
//!
//! A key is the SHA-256 of everything that an entry is made from, so that an entry with the right
//! key is the right entry. Entries are written in `tmp`, flushed, and renamed into place: whoever
//! sees one sees all of it. The manifest names every file with its size and hash; sizes, owner and
//! mode are checked at every start, hashes when an entry is written and by
//! [`Store::verify`], since reading 250 MB each time would cost more than everything else.
//!
//! **Whom this trusts.** An artifact is native code. Loading it is sound because only a process of
//! the same user can have written it: every directory on the way is the user's own and closed to
//! everyone else, and a file that isn't is refused. Whoever can write there can also replace the
//! program. Version skew is caught by the key and by wasmtime's own header.

mod files;
mod manifest;

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

pub(crate) use self::files::{
    check_files, create_private, hash, is_older_than, read_manifest, write_json, write_private,
};
use self::files::{check_private, hex, read_small, sync_tree, tree_bytes};
pub use self::manifest::ImageManifest;
pub(crate) use self::manifest::{Entry, FileRecord, GlobalRecord, MEMORY};
use crate::error::{Error, Result};

/// Version of the layout above and of the manifests. Another one is another entry.
pub(crate) const FORMAT: u32 = 1;
/// The name of the manifest in an image's directory.
const IMAGE_MANIFEST: &str = "image.json";
/// Younger drafts are left alone: their process may not hold the lock yet.
const DRAFT_AGE_MIN: Duration = Duration::from_secs(60);
/// Manifests are small; a larger file isn't one.
const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// What happens while an image is built, for a display.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Progress {
    /// A step begins: its name, and how much there is to do where that is known.
    Begin {
        /// What is being done, such as `compile`.
        step: &'static str,
        /// Bytes to work through.
        bytes: Option<u64>,
    },
    /// So many bytes of the step are done, in all.
    Advance {
        /// Bytes since the step began.
        bytes: u64,
    },
    /// Something was said meanwhile: a line of a build's log, without control characters.
    Log {
        /// At most some hundred characters.
        line: String,
    },
    /// The step is over.
    End {
        /// What came out of it, in words and sizes.
        detail: String,
        /// How long it took.
        elapsed: Duration,
    },
}

/// Receives [`Progress`].
pub type ProgressFn<'a> = &'a (dyn Fn(Progress) + Sync);

/// The directory of everything that Kaa keeps.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store at `root`, making it when it isn't there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the directory belongs to somebody else or others may write to it,
    /// [`Error::Io`] when it can't be made.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        if let Some(parent) = root.parent() {
            fs::create_dir_all(parent)
                .map_err(|e| Error::io(format!("making {}", parent.display()), e))?;
        }
        let store = Self { root };
        store.make_private(&store.root)?;
        for name in ["modules", "images", "names", "scratch", "empty", "tmp"] {
            store.make_private(&store.root.join(name))?;
        }
        Ok(store)
    }

    /// The store's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    pub(crate) fn empty(&self) -> PathBuf {
        self.root.join("empty")
    }

    pub(crate) fn module(&self, key: &str) -> PathBuf {
        self.root.join("modules").join(key)
    }

    pub(crate) fn image(&self, key: &str) -> PathBuf {
        self.root.join("images").join(key)
    }

    /// Makes a directory that only its owner can enter, or checks that it's one.
    fn make_private(&self, path: &Path) -> Result<()> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                check_private(path, true).map(drop)
            }
            Err(e) => Err(Error::io(format!("making {}", path.display()), e)),
        }
    }

    /// Waits until no other process builds, and keeps others from it until the guard is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the lock file can't be made or locked.
    pub(crate) fn lock(&self) -> Result<StoreLock> {
        let path = self.root.join("lock");
        let context = || format!("locking {}", path.display());
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::io(context(), e))?;
        file.lock().map_err(|e| Error::io(context(), e))?;
        Ok(StoreLock(file))
    }

    /// A directory for an entry that is being written; it is removed unless it is published.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be made.
    pub(crate) fn draft(&self) -> Result<TempDir> {
        let parent = self.root.join("tmp");
        tempfile::Builder::new()
            .prefix(&format!("{}-", std::process::id()))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&parent)
            .map_err(|e| Error::io(format!("making a directory in {}", parent.display()), e))
    }

    /// Removes what processes left that died while they wrote. Does nothing while somebody builds.
    pub(crate) fn remove_old_drafts(&self) {
        let lock = File::options().write(true).open(self.root.join("lock"));
        let Some(_lock) = lock.ok().filter(|lock| lock.try_lock().is_ok()) else { return };
        let Ok(entries) = fs::read_dir(self.root.join("tmp")) else { return };
        for entry in entries.flatten() {
            if is_older_than(&entry.path(), DRAFT_AGE_MIN) {
                // What resists is found by the next start.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Puts a finished draft into its place, all at once. An entry that is there already is
    /// replaced: it failed its checks.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be flushed or renamed.
    pub(crate) fn publish(&self, draft: TempDir, place: &Path) -> Result<()> {
        let context = || format!("writing {}", place.display());
        let aside = self.draft()?;
        if place.exists() {
            // Aside and not away: whoever is using it goes on, and nobody sees half of it.
            fs::rename(place, aside.path().join("replaced"))
                .map_err(|e| Error::io(context(), e))?;
        }
        sync_tree(draft.path()).map_err(|e| Error::io(context(), e))?;
        fs::rename(draft.path(), place).map_err(|e| Error::io(context(), e))?;
        // The rename took the directory away from its guard.
        let _ = draft.keep();
        let parent = place.parent().unwrap_or(&self.root);
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(context(), e))
    }

    /// The key that a name stands for.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a name that can't be one.
    pub fn resolve(&self, name: &str) -> Result<Option<String>> {
        check_image_name(name)?;
        match read_small(&self.root.join("names").join(name), 128) {
            Ok(key) => Ok(Some(key.trim().to_owned()).filter(|key| is_key(key))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("reading the image name `{name}`"), e)),
        }
    }

    /// Lets a name stand for a key.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a name that can't be one, [`Error::Io`] when it can't be written.
    pub(crate) fn name(&self, name: &str, key: &str) -> Result<()> {
        check_image_name(name)?;
        let draft = self.draft()?;
        let file = draft.path().join("name");
        let place = self.root.join("names").join(name);
        write_private(&file, key.as_bytes())
            .and_then(|()| fs::rename(&file, &place))
            .map_err(|e| Error::io(format!("writing {}", place.display()), e))
    }

    /// As [`name`](Self::name), where another version of Kaa that uses the same store may have
    /// given the name to its own image meanwhile. A store that can't be written keeps it that way:
    /// the image is found by its key.
    pub(crate) fn ensure_name(&self, name: &str, key: &str) {
        let named = fs::read(self.root.join("names").join(name));
        if !named.is_ok_and(|named| named == key.as_bytes()) {
            let _ = self.name(name, key);
        }
    }

    /// The images that have names, sorted by name. One that can't be read is an error in its place.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the store can't be read.
    pub fn list(&self) -> Result<Vec<(String, Result<ImageManifest>)>> {
        let path = self.root.join("names");
        let entries =
            fs::read_dir(&path).map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names.into_iter().map(|name| (name.clone(), self.manifest_by_name(&name))).collect())
    }

    /// The manifest of a named image, after the cheap checks.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when there is no such image, [`Error::Incompatible`] when it's damaged.
    pub fn manifest_by_name(&self, name: &str) -> Result<ImageManifest> {
        let key = self.resolve(name)?.ok_or_else(|| no_image(name))?;
        self.manifest(&key)
    }

    /// The manifest of the image of a key that comes from outside.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when it isn't a key, and as for an image of the store.
    pub(crate) fn manifest_by_key(&self, key: &str) -> Result<ImageManifest> {
        if !is_key(key) {
            return Err(Error::invalid("image", "its key is none"));
        }
        self.manifest(key)
    }

    /// The manifest of an image, after the cheap checks of all its files.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when something is missing, of another size, owner or mode.
    pub(crate) fn manifest(&self, key: &str) -> Result<ImageManifest> {
        let place = self.image(key);
        let manifest: ImageManifest = read_manifest(&place.join(IMAGE_MANIFEST))?;
        if manifest.format != FORMAT || manifest.key != key {
            return Err(Error::Incompatible {
                what: format!("the image {}", place.display()),
                expected: format!("format {FORMAT} and key {key}"),
                found: format!("format {} and key {}", manifest.format, manifest.key),
            });
        }
        check_files(&place, &manifest.files)?;
        Ok(manifest)
    }

    /// Writes an image's manifest into its draft.
    pub(crate) fn write_manifest(draft: &Path, manifest: &ImageManifest) -> Result<()> {
        write_json(&draft.join(IMAGE_MANIFEST), manifest)
    }

    /// Reads every byte of an image and of the module it runs on, and compares the hashes.
    /// Returns the number of bytes read.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] naming the first file that isn't what it was.
    pub fn verify(&self, name: &str) -> Result<u64> {
        let manifest = self.manifest_by_name(name)?;
        let module = self.module(&manifest.module);
        let module_files: ModuleFiles = read_manifest(&module.join("module.json"))?;
        check_files(&module, &module_files.files)?;
        let mut bytes = 0;
        for (place, files) in
            [(self.image(&manifest.key), &manifest.files), (module, &module_files.files)]
        {
            for record in files {
                let path = place.join(&record.path);
                let found = FileRecord::of(&place, &record.path)?;
                if found != *record {
                    return Err(Error::Incompatible {
                        what: format!("the file {}", path.display()),
                        expected: format!("sha256 {}", record.sha256),
                        found: format!(
                            "sha256 {}; remove the image and build it again",
                            found.sha256
                        ),
                    });
                }
                bytes += record.bytes;
            }
        }
        Ok(bytes)
    }

    /// Removes a name, and the image when no other name or image needs it.
    ///
    /// Sessions that run from it go on: what they have mapped stays.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when there is no such image.
    pub fn remove(&self, name: &str) -> Result<()> {
        let _lock = self.lock()?;
        let key = self.resolve(name)?.ok_or_else(|| no_image(name))?;
        let place = self.root.join("names").join(name);
        fs::remove_file(&place)
            .map_err(|e| Error::io(format!("removing {}", place.display()), e))?;
        let needed = self.list()?.into_iter().any(|(_, manifest)| {
            manifest.is_ok_and(|other| other.key == key || other.parent.as_ref() == Some(&key))
        });
        let image = self.image(&key);
        if !needed && image.exists() {
            fs::remove_dir_all(&image)
                .map_err(|e| Error::io(format!("removing {}", image.display()), e))?;
        }
        Ok(())
    }

    /// Removes images that no name stands for, directly or as a parent, and compiled guests but
    /// `current` that no image is left for. Returns the bytes that are free again.
    ///
    /// # Errors
    ///
    /// The first error of a manifest: what can't be read can't be called unused.
    pub(crate) fn prune(&self, current: &str) -> Result<u64> {
        let _lock = self.lock()?;
        let (mut images, mut modules) = (HashSet::new(), HashSet::from([current.to_owned()]));
        for (_, manifest) in self.list()? {
            let mut next = Some(manifest?);
            while let Some(manifest) = next {
                next = manifest.parent.as_ref().map(|key| self.manifest(key)).transpose()?;
                images.insert(manifest.key);
                modules.insert(manifest.module);
            }
        }
        Ok(remove_others(&self.root.join("images"), &images)?
            + remove_others(&self.root.join("modules"), &modules)?)
    }
}

/// The part of a module's manifest that the store reads.
#[derive(Deserialize)]
struct ModuleFiles {
    files: Vec<FileRecord>,
}

/// Held while a process builds.
#[derive(Debug)]
pub(crate) struct StoreLock(
    #[expect(dead_code, reason = "closing the file releases the lock")] File,
);

/// Removes every entry whose key isn't one of `keep`; the bytes that they had.
fn remove_others(directory: &Path, keep: &HashSet<String>) -> Result<u64> {
    let context = |path: &Path| format!("removing what isn't used from {}", path.display());
    let mut bytes = 0;
    for entry in fs::read_dir(directory).map_err(|e| Error::io(context(directory), e))? {
        let path = entry.map_err(|e| Error::io(context(directory), e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if is_key(name) && !keep.contains(name) {
            bytes += tree_bytes(&path).map_err(|e| Error::io(context(&path), e))?;
            fs::remove_dir_all(&path).map_err(|e| Error::io(context(&path), e))?;
        }
    }
    Ok(bytes)
}

fn no_image(name: &str) -> Error {
    Error::invalid(
        format!("image `{name}`"),
        "there is no such image; `kaa image list` shows those that there are, `kaa image build` makes one",
    )
}

fn is_key(text: &str) -> bool {
    text.len() == 64
        && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Whether `name` can name an image: it becomes a file name.
pub(crate) fn check_image_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(allowed) {
        return Ok(());
    }
    Err(Error::invalid(
        format!("image name `{}`", name.escape_debug()),
        "use 1 to 64 letters, digits, `-`, `_` and `.`, not a `.` first",
    ))
}

/// The key of an entry: SHA-256 over what it's made from, each part with its length.
pub(crate) fn key<'part>(parts: impl IntoIterator<Item = &'part [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hex(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (TempDir, Store) {
        let parent = tempfile::tempdir().unwrap();
        let store = Store::open(parent.path().join("store")).unwrap();
        (parent, store)
    }

    fn entry(store: &Store, name: &str) -> ImageManifest {
        let draft = store.draft().unwrap();
        write_private(&draft.path().join("memory.bin"), b"memory").unwrap();
        let key = key([name.as_bytes()]);
        let manifest = ImageManifest {
            format: FORMAT,
            key: key.clone(),
            name: name.into(),
            module: String::new(),
            parent: None,
            imports: vec![],
            python: "3".into(),
            memory_bytes: 6,
            site: false,
            globals: vec![],
            entry: Entry { code: 0, names: 0, mailbox: None },
            dot: 0,
            files: vec![FileRecord::of(draft.path(), "memory.bin").unwrap()],
        };
        Store::write_manifest(draft.path(), &manifest).unwrap();
        store.publish(draft, &store.image(&key)).unwrap();
        store.name(name, &key).unwrap();
        manifest
    }

    #[test]
    fn what_is_published_is_found_listed_and_removed() {
        let (_parent, store) = store();
        let manifest = entry(&store, "one");
        assert_eq!(store.manifest_by_name("one").unwrap(), manifest);
        // Another version made its own image of that name.
        store.name("one", &entry(&store, "two").key).unwrap();
        store.ensure_name("one", &manifest.key);
        assert_eq!(store.manifest_by_name("one").unwrap(), manifest);
        store.remove("two").unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        store.remove("one").unwrap();
        assert!(!store.image(&manifest.key).exists());
        assert!(matches!(store.manifest_by_name("one"), Err(Error::Invalid { .. })));
        assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn what_nothing_refers_to_is_pruned() {
        let (_parent, store) = store();
        let (old, new) = (entry(&store, "one"), entry(&store, "two"));
        store.name("one", &new.key).unwrap();
        let module = store.module(&"0".repeat(64));
        fs::create_dir(&module).unwrap();
        fs::write(module.join("python.cwasm"), "code").unwrap();
        let freed = store.prune("").unwrap();
        assert!(freed > 10, "{freed}");
        assert!(!store.image(&old.key).exists() && !module.exists());
        assert!(store.manifest_by_name("one").is_ok() && store.manifest_by_name("two").is_ok());
    }

    #[test]
    fn a_damaged_or_open_entry_is_refused() {
        type Damage = fn(&Path);
        let cases: &[(&str, Damage)] = &[
            ("truncated", |place| {
                OpenOptions::new()
                    .write(true)
                    .open(place.join("memory.bin"))
                    .unwrap()
                    .set_len(3)
                    .unwrap();
            }),
            ("missing", |place| fs::remove_file(place.join("memory.bin")).unwrap()),
            ("readable by others", |place| {
                let mode = fs::Permissions::from_mode(0o644);
                fs::set_permissions(place.join("memory.bin"), mode).unwrap();
            }),
            ("open directory", |place| {
                fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
            }),
            ("a link", |place| {
                fs::rename(place.join("memory.bin"), place.join("elsewhere")).unwrap();
                std::os::unix::fs::symlink("elsewhere", place.join("memory.bin")).unwrap();
            }),
            ("older format", |place| {
                let path = place.join(IMAGE_MANIFEST);
                let text =
                    fs::read_to_string(&path).unwrap().replace("\"format\": 1", "\"format\": 0");
                fs::write(path, text).unwrap();
            }),
            ("garbage", |place| fs::write(place.join(IMAGE_MANIFEST), "{").unwrap()),
        ];
        for (what, damage) in cases {
            let (_parent, store) = store();
            let manifest = entry(&store, "one");
            damage(&store.image(&manifest.key));
            let error = store.manifest_by_name("one").unwrap_err();
            assert!(
                matches!(error, Error::Incompatible { .. } | Error::Io { .. }),
                "{what}: {error}"
            );
        }
    }

    #[test]
    fn names_that_would_be_paths_are_refused() {
        let (_parent, store) = store();
        for name in ["", "../x", "a/b", ".hidden", "a b", "\0"] {
            assert!(matches!(store.resolve(name), Err(Error::Invalid { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_store_that_others_can_enter_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("store");
        fs::create_dir(&root).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(Store::open(&root), Err(Error::Incompatible { .. })));
    }
}
