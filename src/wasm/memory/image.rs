//! What memories are mapped from: images, and runs of pages that lie over them.
//!
//! Their files are written once and never changed, so that they can be mapped, compared and shared
//! without copying: a mapped file that shrinks would turn an access into `SIGBUS`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};

use super::{RESERVATION, WASM_PAGE};
use crate::error::{Error, Result};

/// The memory of an image: an immutable file of whole Wasm pages.
#[derive(Debug)]
pub(crate) struct MemoryImage {
    file: File,
    bytes: usize,
    view: View,
}

impl MemoryImage {
    /// An image over the first `bytes` bytes of `file`, which must stay as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when the file isn't that long or `bytes` isn't whole Wasm pages.
    pub(crate) fn new(file: File, bytes: usize) -> Result<Self> {
        let found = file.metadata().map_err(|e| Error::io("reading a memory image", e))?.len();
        if found != bytes as u64 || !bytes.is_multiple_of(WASM_PAGE) || bytes > RESERVATION {
            return Err(Error::Incompatible {
                what: "the memory image".into(),
                expected: format!("{bytes} bytes in whole pages of {WASM_PAGE}"),
                found: format!("{found} bytes"),
            });
        }
        let view = View::new(&file, bytes)?;
        Ok(Self { file, bytes, view })
    }

    /// An image of this memory, held in memory that the system can account and swap, by nobody's
    /// name. Zero pages take no room.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no room for it.
    pub(crate) fn of(memory: &[u8]) -> Result<Self> {
        const CHUNK: usize = WASM_PAGE;
        let write = || {
            let file = anonymous_file()?;
            file.set_len(memory.len() as u64)?;
            for (at, chunk) in memory.chunks(CHUNK).enumerate() {
                if chunk.iter().any(|byte| *byte != 0) {
                    file.write_all_at(chunk, (at * CHUNK) as u64)?;
                }
            }
            seal(&file)?;
            Ok(file)
        };
        let file = write().map_err(|e| Error::io("saving a session's memory", e))?;
        Self::new(file, memory.len())
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Size of the image's memory.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory itself.
    pub(crate) fn contents(&self) -> &[u8] {
        self.view.bytes()
    }
}

/// A part of a memory that lies in a sealed file of its own, over an image. Cheap to clone: forks
/// share the file.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// Offset in the memory, in whole pages.
    start: usize,
    bytes: usize,
    /// Where it begins in the file.
    offset: usize,
    file: Arc<RunFile>,
}

#[derive(Debug)]
struct RunFile {
    file: File,
    view: View,
}

impl Run {
    /// Runs that share one file: each lies at its `start` and consists of its parts, whole pages.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no room for them.
    pub(crate) fn write<'part>(
        runs: impl IntoIterator<Item = (usize, Vec<&'part [u8]>)>,
    ) -> Result<Vec<Self>> {
        let mut places = Vec::new();
        let mut total = 0;
        let write = || {
            let mut file = anonymous_file()?;
            for (start, parts) in runs {
                let offset = total;
                for part in parts {
                    io::Write::write_all(&mut file, part)?;
                    total += part.len();
                }
                places.push((start, offset, total - offset));
            }
            seal(&file)?;
            Ok(file)
        };
        let file = write().map_err(|e| Error::io("saving a part of a session's memory", e))?;
        let view = View::new(&file, total)?;
        let file = Arc::new(RunFile { file, view });
        let run = |(start, offset, bytes)| Self { start, bytes, offset, file: Arc::clone(&file) };
        Ok(places.into_iter().map(run).collect())
    }

    /// Where it lies.
    pub(crate) fn range(&self) -> Range<usize> {
        self.start..self.start + self.bytes
    }

    /// What lies there.
    pub(crate) fn contents(&self) -> &[u8] {
        &self.file.view.bytes()[self.offset..][..self.bytes]
    }

    /// The file, and where the run begins in it.
    pub(super) fn file(&self) -> (&File, u64) {
        (&self.file.file, self.offset as u64)
    }

    /// Whether both show the same bytes of the same file at the same place.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let place = |run: &Self| (run.start, run.bytes, run.offset);
        place(self) == place(other) && Arc::ptr_eq(&self.file, &other.file)
    }

    /// Whether both are of the same file.
    pub(crate) fn is_of_file(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.file, &other.file)
    }

    /// How many runs there are of its file, wherever they are.
    pub(crate) fn sharers(&self) -> usize {
        Arc::strong_count(&self.file)
    }

    /// What is left of the run, before and after `range`.
    pub(crate) fn without(&self, range: &Range<usize>) -> impl Iterator<Item = Self> {
        let own = self.range();
        let before = own.start..range.start.min(own.end);
        let after = range.end.max(own.start)..own.end;
        let part = |part: Range<usize>| Self {
            start: part.start,
            bytes: part.len(),
            offset: self.offset + (part.start - own.start),
            file: Arc::clone(&self.file),
        };
        [before, after]
            .into_iter()
            .filter(|part| !part.is_empty())
            .map(part)
            .collect::<Vec<_>>()
            .into_iter()
    }
}

/// Read-only sight of a file that never changes: to compare and copy without a call of the system
/// per page.
#[derive(Debug)]
struct View {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is read-only, owned by this value until it is dropped, and not tied to a thread.
#[expect(unsafe_code, reason = "a raw address keeps the auto trait away")]
unsafe impl Send for View {}
// SAFETY: as above; nobody can write through it.
#[expect(unsafe_code, reason = "a raw address keeps the auto trait away")]
unsafe impl Sync for View {}

impl View {
    fn new(file: &File, bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self { base: NonNull::dangling(), bytes });
        }
        #[expect(unsafe_code, reason = "maps a file; the mm calls of rustix are unsafe")]
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let base = unsafe {
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            rustix::mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, flags, file, 0)
        };
        let base = base.map_err(|e| Error::io("mapping a memory image", e.into()))?;
        let base = NonNull::new(base.cast());
        let base = base.ok_or_else(|| Error::Internal("a mapping at address 0".into()))?;
        Ok(Self { base, bytes })
    }

    fn bytes(&self) -> &[u8] {
        #[expect(unsafe_code, reason = "refers to the value's own mapping")]
        // SAFETY: the mapping is `bytes` long (or empty and dangling), readable, owned by this value,
        // and its file never changes: it is sealed against another size, has no name, and is not
        // written to any more (see `seal`), or it is in a store that only its user can write and
        // that never writes a published file (see `image.rs`).
        unsafe {
            std::slice::from_raw_parts(self.base.as_ptr(), self.bytes)
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if self.bytes > 0 {
            #[expect(unsafe_code, reason = "gives the value's own mapping back")]
            // SAFETY: the mapping was made in `new`, is owned by this value, and not used after drop.
            let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
            debug_assert!(result.is_ok(), "unmapping a view: {result:?}");
        }
    }
}

#[cfg(target_os = "linux")]
fn anonymous_file() -> io::Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    Ok(memfd_create("kaa-image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// Makes sure that the file stays as it is: a mapped file that shrinks is a `SIGBUS`.
///
/// The kernel refuses the seal against writing while it has pages of the file in its own hands, as it
/// does for moments when it moves memory about. Nobody else has the file, and nobody here writes to it
/// after this: that seal is a second lock on a closed door, and not worth a session.
#[cfg(target_os = "linux")]
fn seal(file: &File) -> io::Result<()> {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW)?;
    match fcntl_add_seals(file, SealFlags::WRITE | SealFlags::SEAL) {
        Err(rustix::io::Errno::BUSY) => Ok(fcntl_add_seals(file, SealFlags::SEAL)?),
        sealed => Ok(sealed?),
    }
}

#[cfg(not(target_os = "linux"))]
fn anonymous_file() -> io::Result<File> {
    tempfile::tempfile()
}

/// Nobody else has the file: it has no name.
#[cfg(not(target_os = "linux"))]
fn seal(_file: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_in_the_kernels_hands_is_sealed_as_far_as_it_can_be() {
        use rustix::fs::{SealFlags, fcntl_add_seals};
        let mut file = anonymous_file().unwrap();
        io::Write::write_all(&mut file, &[7; 4096]).unwrap();
        #[expect(unsafe_code, reason = "makes the kernel answer as when it holds pages")]
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing, and nobody
        // reads or writes it.
        let held = unsafe {
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), 4096, rights, MapFlags::SHARED, &file, 0)
                .unwrap()
        };
        let refused = fcntl_add_seals(&file, SealFlags::WRITE);
        assert_eq!(refused, Err(rustix::io::Errno::BUSY));
        seal(&file).unwrap();
        for bytes in [0, 8192] {
            assert_eq!(file.set_len(bytes).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        #[expect(unsafe_code, reason = "gives the mapping back")]
        // SAFETY: it was made above and is not used after this.
        unsafe { rustix::mm::munmap(held, 4096) }.unwrap();
    }
}
