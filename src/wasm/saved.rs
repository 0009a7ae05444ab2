//! A session's state as a value: what snapshots, forks and templates are made from.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::files::FILE_BYTES;
use super::memory::Run;
use super::session::{RUN_BYTES, Session, Start};
use super::state::{PAGE, State};
use super::{Image, files};
use crate::error::{Error, Result};
use crate::image::ImageManifest;
use crate::limits::Limits;
use crate::snapshot::format::{self, Bounds, SavedFile, Sink, Writer};
use crate::snapshot::{
    SessionRecord, SnapshotData, SnapshotHeader, SnapshotImage, open as open_snapshot,
};

/// The name of this backend.
pub(crate) const BACKEND: &str = "wasm";
/// Pages of one piece that is handed to the writer.
const PIECE_PAGES: usize = 256;

/// A saved session.
#[derive(Clone)]
pub(crate) struct Saved {
    /// The image from the store that it began with.
    pub(crate) image: Image,
    pub(crate) state: State,
    pub(crate) record: SessionRecord,
    pub(crate) files: Arc<[SavedFile]>,
    /// The state in the form that is cheap to begin from, made when it is first needed.
    condensed: OnceLock<State>,
}

impl Saved {
    /// What the session is at its checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the files that the guest has open, or one that can't be saved.
    pub(crate) fn capture(image: &Image, session: &Session) -> Result<Self> {
        let guest = session.guest();
        let open: Vec<String> =
            guest.files.open_paths().map(|path| format!("`{}`", path.escape_debug())).collect();
        if !open.is_empty() {
            let reason = format!(
                "the session has files open, which can't be saved: {}; close them first",
                open.join(", ")
            );
            return Err(Error::invalid("snapshot", reason));
        }
        let files = match &guest.scratch {
            Some(scratch) if !guest.files.is_unused() => {
                files::read_tree(scratch.path(), guest.files.bytes_max())?
            }
            _ => Vec::new(),
        };
        let state = session.checkpoint().clone();
        Ok(Self::new(image.clone(), state, guest.record(), files.into()))
    }

    pub(crate) fn new(
        image: Image,
        state: State,
        record: SessionRecord,
        files: Arc<[SavedFile]>,
    ) -> Self {
        Self { image, state, record, files, condensed: OnceLock::new() }
    }

    /// The state, for a session that begins with it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no room for it.
    pub(crate) fn condensed(&self) -> Result<&State> {
        if let Some(state) = self.condensed.get() {
            return Ok(state);
        }
        let state = self.state.condensed()?;
        Ok(self.condensed.get_or_init(|| state))
    }

    /// Whether it fits into a session of these limits.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the limit.
    pub(crate) fn check(&self, limits: &Limits) -> Result<()> {
        for (limit, most, found) in [
            ("limits.memory_bytes", limits.memory_bytes, self.state.bytes as u64),
            ("limits.disk_bytes", limits.disk_bytes, self.file_bytes()),
        ] {
            if found > most {
                let reason = format!("the snapshot has {found} bytes, {most} are allowed");
                return Err(Error::invalid(limit, reason));
            }
        }
        Ok(())
    }

    /// The state, for a session to go back to: in the form that shares most with it.
    pub(crate) fn state_for_restore(&self) -> &State {
        self.condensed.get().unwrap_or(&self.state)
    }

    /// Whether sessions of `image` can go to this state.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when they can't.
    pub(crate) fn check_image(&self, image: &Image) -> Result<()> {
        let manifest = self.image.manifest();
        check_image(image.manifest(), &reference(manifest), &manifest.module)
    }

    fn file_bytes(&self) -> u64 {
        let bytes = |file: &SavedFile| match file {
            SavedFile::File { bytes, .. } => bytes.len() as u64,
            _ => 0,
        };
        self.files.iter().map(bytes).sum()
    }

    /// The image's state, of which a file need not say anything.
    pub(crate) fn base(&self) -> State {
        State::of(Arc::clone(&self.image.0.start.memory), Vec::new())
    }

    fn header(&self, pages: u64) -> SnapshotHeader {
        let manifest = self.image.manifest();
        SnapshotHeader {
            kaa: env!("CARGO_PKG_VERSION").to_owned(),
            python: manifest.python.clone(),
            image: reference(manifest),
            module: manifest.module.clone(),
            memory_bytes: self.state.bytes as u64,
            globals: Start::records(&manifest.globals, &self.state.globals),
            session: self.record.clone(),
            pages,
            files: self.files.len() as u64,
            file_bytes: self.file_bytes(),
        }
    }

    /// Writes what the state has and `base` hasn't, and the files.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be written, [`Error::Invalid`] naming a file that the format can't
    /// hold.
    pub(crate) fn write<W: Write>(&self, out: W, base: &State) -> Result<W> {
        let pages = self.state.differences(base).count() as u64;
        let mut writer = Writer::new(out, &self.header(pages))?;
        let (mut first, mut piece) = (0, Vec::with_capacity(PIECE_PAGES * PAGE));
        for (number, page) in self.state.differences(base) {
            let full = piece.len() == PIECE_PAGES * PAGE;
            if full || number != first + piece.len() / PAGE {
                if !piece.is_empty() {
                    writer.pages(first as u32, &piece)?;
                }
                piece.clear();
                first = number;
            }
            piece.extend_from_slice(page);
        }
        if !piece.is_empty() {
            writer.pages(first as u32, &piece)?;
        }
        self.files.iter().try_for_each(|file| writer.file(file))?;
        writer.finish()
    }

    /// Reads a snapshot file of a session of `image`, which `find` gives for its header.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when it's damaged, too large, or its image isn't here.
    pub(crate) fn load(
        path: &Path,
        limits: &Limits,
        find: impl FnOnce(&SnapshotHeader) -> Result<Image>,
    ) -> Result<Self> {
        let file = open_snapshot(path)?;
        let bounds = Bounds {
            memory_bytes: limits.memory_bytes,
            file_bytes: limits.disk_bytes,
            files: limits.disk_bytes / FILE_BYTES,
        };
        let mut image = None;
        let mut loading = Loading::default();
        let accept = |header: &SnapshotHeader| {
            image = Some(find(header)?);
            Ok(())
        };
        let header = format::read(file, &bounds, accept, &mut loading)?;
        let image = image.ok_or_else(|| Error::Internal("a snapshot without an image".into()))?;
        let state = loading.state(&image.0.start, &header, &[])?;
        Ok(Self::new(image, state, header.session, loading.files.into()))
    }
}

impl SnapshotData for Saved {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    fn save(&self, path: &Path) -> Result<u64> {
        let context = || format!("writing the snapshot {}", path.display());
        if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            // A rename would put a file in the place of a device.
            let reason = "there is something that isn't a file; name another path";
            return Err(Error::invalid(format!("the snapshot {}", path.display()), reason));
        }
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // Beside its place, private, and renamed when all of it is on the disk.
        let draft = tempfile::NamedTempFile::new_in(parent).map_err(|e| Error::io(context(), e))?;
        self.write(BufWriter::new(draft.as_file()), &self.base())?;
        draft.as_file().sync_all().map_err(|e| Error::io(context(), e))?;
        let bytes = draft.as_file().metadata().map_err(|e| Error::io(context(), e))?.len();
        draft.persist(path).map_err(|e| Error::io(context(), e.error))?;
        Ok(bytes)
    }
}

fn reference(image: &ImageManifest) -> SnapshotImage {
    SnapshotImage {
        name: image.name.clone(),
        key: image.key.clone(),
        memory_sha256: image.memory_sha256().to_owned(),
    }
}

/// What has been read of a snapshot.
#[derive(Default)]
pub(crate) struct Loading {
    /// Rows of pages: the first page's number, and their bytes.
    rows: Vec<(usize, Vec<u8>)>,
    pub(crate) files: Vec<SavedFile>,
}

impl Sink for Loading {
    fn pages(&mut self, first_page: u32, bytes: &[u8]) -> Result<()> {
        let first = first_page as usize;
        match self.rows.last_mut() {
            Some((start, row)) if *start + row.len() / PAGE == first => {
                row.extend_from_slice(bytes);
            }
            _ => self.rows.push((first, bytes.to_vec())),
        }
        Ok(())
    }

    fn file(&mut self, file: SavedFile) -> Result<()> {
        self.files.push(file);
        Ok(())
    }
}

impl Loading {
    /// The state that was read, over an image and the runs that were not written.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when the header doesn't fit the image.
    pub(crate) fn state(
        &mut self,
        start: &Start,
        header: &SnapshotHeader,
        runs: &[Run],
    ) -> Result<State> {
        let bytes = header.memory_bytes as usize;
        if bytes < start.memory.bytes() || !bytes.is_multiple_of(super::memory::WASM_PAGE) {
            return Err(Error::Incompatible {
                what: "the snapshot".into(),
                expected: format!("a memory of at least {} bytes", start.memory.bytes()),
                found: format!("{bytes} bytes"),
            });
        }
        let mut state = State::of(Arc::clone(&start.memory), start.values(&header.globals)?);
        state.bytes = bytes;
        runs.iter().for_each(|run| state.lay(run.clone()));
        for (first, row) in self.rows.drain(..) {
            if row.len() >= RUN_BYTES {
                let run = Run::write([(first * PAGE, vec![&row[..]])])?;
                run.into_iter().for_each(|run| state.lay(run));
            } else {
                state.set(first, &row);
            }
        }
        Ok(state)
    }
}

/// Whether `image` is the one that a snapshot was made with, byte for byte.
///
/// # Errors
///
/// [`Error::Incompatible`] when it isn't.
pub(crate) fn check_image(
    image: &ImageManifest,
    wanted: &SnapshotImage,
    module: &str,
) -> Result<()> {
    let SnapshotImage { name, key, memory_sha256 } = wanted;
    if image.key == *key && image.memory_sha256() == memory_sha256 && image.module == module {
        return Ok(());
    }
    Err(Error::Incompatible {
        what: "the snapshot".into(),
        expected: format!("one of the image `{}` {}", image.name, short(image.memory_sha256())),
        found: format!("one of the image `{}` {}", name.escape_debug(), short(memory_sha256)),
    })
}

/// The beginning of a digest, whatever a file says it is.
fn short(digest: &str) -> String {
    digest.chars().take(12).filter(char::is_ascii_hexdigit).collect()
}

/// Makes the scratch directory what it was.
///
/// # Errors
///
/// [`Error::Io`] when a file can't be written.
pub(crate) fn write_files(root: &Path, files: &[SavedFile]) -> Result<()> {
    for file in files {
        let (path, done) = match file {
            SavedFile::Directory { path } => (path, fs::create_dir(root.join(path))),
            SavedFile::File { path, bytes } => (path, fs::write(root.join(path), bytes)),
            SavedFile::Link { path, target } => {
                (path, std::os::unix::fs::symlink(target, root.join(path)))
            }
        };
        done.map_err(|e| Error::io(format!("restoring the session's file `{path}`"), e))?;
    }
    Ok(())
}
