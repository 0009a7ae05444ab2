//! Linear memories as private copy-on-write views of an image file. **The unsafe file.**
//!
//! A [`Slot`] reserves the whole reach of a 32-bit memory plus a guard, maps an image at its bottom
//! (`MAP_PRIVATE`: a page is copied when the guest first writes it), and lets it grow into zero
//! pages. Runs of pages that differ from the image and are large lie in files of their own, mapped
//! over it ([`Run`]). wasmtime gets a slot through [`SlotCreator`]; the session keeps a second handle,
//! with which it asks which pages the guest wrote and brings the memory to another state.
//!
//! Image files are written once, renamed into place and never changed: a mapped file that shrinks
//! would turn a guest's access into `SIGBUS`.

mod image;

use std::cell::RefCell;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::dirty::DirtyPages;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

pub(crate) use self::image::{MemoryImage, Run};
use crate::error::{Error, Result};

/// Bytes of a Wasm page.
pub(crate) const WASM_PAGE: usize = 64 << 10;
/// What is reserved for each memory: the reach of a 32-bit address. Must agree with
/// `Config::memory_reservation`.
pub(crate) const RESERVATION: usize = 4 << 30;
/// Inaccessible bytes behind the reservation: compiled code relies on them to leave bounds checks
/// out. Must agree with `Config::memory_guard_size`.
pub(crate) const GUARD: usize = 32 << 20;

/// What is reserved for the engine's own heap of exception objects, one per session. Its size tells
/// the two kinds of memory apart in [`SlotCreator`]. Must agree with `Config::gc_heap_reservation`.
pub(crate) const GC_RESERVATION: usize = 64 << 20;
/// As [`GUARD`], for that heap. Must agree with `Config::gc_heap_guard_size`.
pub(crate) const GC_GUARD: usize = 1 << 20;

/// A memory that grows by this many bytes at once is about to hold one large object: with huge pages
/// filling it takes half the time. Smaller growth would only waste them.
const HUGE_GROWTH: usize = 4 << 20;

const _: () = assert!(RESERVATION.is_multiple_of(WASM_PAGE) && GUARD.is_multiple_of(WASM_PAGE));
const _: () = assert!(GC_RESERVATION < RESERVATION, "the reservation tells the kind of memory");
const _: () = assert!(size_of::<usize>() == 8, "Kaa needs a 64-bit address space");

/// Address space that nothing else uses: inaccessible until a part of it is opened.
#[derive(Debug)]
pub(super) struct Reservation {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: `base` is the address of a mapping that this value owns alone until it is dropped; nothing
// in it is tied to a thread, and the methods on `&self` only ask the kernel about the mapping.
#[expect(unsafe_code, reason = "a raw address keeps the auto trait away")]
unsafe impl Send for Reservation {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a raw address keeps the auto trait away")]
unsafe impl Sync for Reservation {}

impl Reservation {
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        #[expect(unsafe_code, reason = "reserves address space; the mm calls of rustix are unsafe")]
        // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes })
    }

    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    pub(super) fn addresses(&self) -> Range<usize> {
        let start = self.base.as_ptr() as usize;
        start..start + self.bytes
    }

    /// Gives the memory of `range`, which is open, back to the system: it reads as zeros.
    pub(super) fn discard(&mut self, range: Range<usize>) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range of the reservation");
        #[expect(unsafe_code, reason = "replaces pages of the value's own mapping")]
        // SAFETY: the range lies in a mapping that this value owns, and `&mut self` is the only way
        // to it at this moment.
        unsafe {
            let start = self.base.as_ptr().byte_add(range.start).cast();
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            let writable = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap_anonymous(start, range.end - range.start, writable, flags)?;
        }
        Ok(())
    }

    /// The words of `range`, which must be open.
    pub(super) fn words(&mut self, range: Range<usize>) -> &mut [u64] {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range of the reservation");
        assert!(range.start.is_multiple_of(8) && range.end.is_multiple_of(8), "whole words");
        #[expect(unsafe_code, reason = "refers to the value's own mapping")]
        // SAFETY: the range lies in this value's mapping, is aligned, and callers ask only for pages
        // that they opened; any bits are a `u64`. `&mut self` keeps everyone else away from it: what
        // hands the mapping out (a stack) owns the value and asks when the fiber is gone.
        unsafe {
            let start = self.base.as_ptr().byte_add(range.start).cast::<u64>();
            std::slice::from_raw_parts_mut(start, (range.end - range.start) / 8)
        }
    }

    /// Makes `range` readable and writable.
    pub(super) fn open(&self, range: Range<usize>) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range of the reservation");
        #[expect(unsafe_code, reason = "opens pages of the value's own reservation")]
        // SAFETY: the range lies in a mapping that this value owns (checked above). Its pages hold
        // what they held; more access takes nothing from anyone who refers to them.
        unsafe {
            let start = self.base.as_ptr().byte_add(range.start).cast();
            let writable = MprotectFlags::READ | MprotectFlags::WRITE;
            rustix::mm::mprotect(start, range.end - range.start, writable)?;
        }
        Ok(())
    }

    /// Asks for huge pages in `range`, where the system has them.
    fn prefer_huge_pages(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes, "a range of the reservation");
        #[cfg(target_os = "linux")]
        {
            use rustix::mm::{Advice, madvise};
            #[expect(unsafe_code, reason = "advises about the value's own reservation")]
            // SAFETY: the range lies in a mapping that this value owns (checked above), and this
            // advice changes no contents. A kernel without huge pages refuses it, without harm.
            let _ = unsafe {
                let start = self.base.as_ptr().byte_add(range.start).cast();
                madvise(start, range.end - range.start, Advice::LinuxHugepage)
            };
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "gives the value's own mapping back")]
        // SAFETY: the mapping was made in `new`, is owned by this value, and is not used after drop.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(result.is_ok(), "unmapping a reservation: {result:?}");
    }
}

/// The address space of one session's memory.
#[derive(Debug)]
pub(crate) struct Slot {
    space: Reservation,
    image: Arc<MemoryImage>,
    accessible: AtomicUsize,
}

impl Slot {
    /// Reserves address space and maps `image` at its bottom.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the system has no address space or mappings left.
    pub(crate) fn new(image: Arc<MemoryImage>) -> Result<Self> {
        let space = Reservation::new(RESERVATION + GUARD)
            .map_err(|e| Error::io("reserving 4 GiB of address space for a session", e))?;
        let mut slot = Self { space, image, accessible: AtomicUsize::new(0) };
        let bytes = slot.image.bytes();
        slot.map(bytes)?;
        Ok(slot)
    }

    /// The image that the slot is a view of.
    pub(crate) fn image(&self) -> &Arc<MemoryImage> {
        &self.image
    }

    /// Throws away what the guest wrote: `image` again, or another one, then zeros up to `bytes`.
    ///
    /// `&mut self` proves that no instance has the memory any more: an instance holds the slot by
    /// an `Arc`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the system refuses a mapping; the slot must not be used then.
    pub(crate) fn rewind(&mut self, image: &Arc<MemoryImage>, bytes: usize) -> Result<()> {
        self.image = Arc::clone(image);
        assert!(
            bytes >= image.bytes() && bytes <= RESERVATION,
            "a memory never shrinks below its image"
        );
        #[expect(unsafe_code, reason = "replaces mappings inside the slot's own reservation")]
        // SAFETY: the range belongs to this slot's reservation, and with `&mut self` no reference
        // into the mapping exists.
        let result = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(self.base(), RESERVATION, ProtFlags::empty(), flags)
        };
        result.map_err(|e| Error::io("unmapping what a session wrote", e.into()))?;
        self.map(bytes)
    }

    /// Maps the image at the bottom of a slot that holds nothing, and opens zeros up to `bytes`.
    fn map(&mut self, bytes: usize) -> Result<()> {
        let image_bytes = self.image.bytes();
        if image_bytes > 0 {
            #[expect(unsafe_code, reason = "replaces mappings inside the slot's own reservation")]
            // SAFETY: `image_bytes` is at most `RESERVATION` (checked in `MemoryImage::new`), so that
            // the range belongs to this slot; with `&mut self` no reference into it exists.
            let result = unsafe {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                let writable = ProtFlags::READ | ProtFlags::WRITE;
                rustix::mm::mmap(self.base(), image_bytes, writable, flags, self.image.file(), 0)
            };
            result.map_err(|e| Error::io("mapping an image into a session", e.into()))?;
        }
        self.space
            .open(image_bytes..bytes)
            .map_err(|e| Error::io("opening a session's memory", e))?;
        self.accessible.store(bytes, Ordering::Release);
        Ok(())
    }

    /// Lays `run` over what is there; what the guest wrote there is gone.
    ///
    /// `memory` is the instance's own sight of this slot: borrowing it for writing proves that
    /// nobody else looks at it, and that no guest runs in it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the system refuses the mapping; the memory must not be used then.
    pub(crate) fn lay(&self, memory: &mut [u8], run: &Run) -> Result<()> {
        self.replace(memory, run.range(), Some(run.file()))
    }

    /// Makes `range` of the memory the image again, zeros where the image has ended.
    ///
    /// # Errors
    ///
    /// As [`lay`](Self::lay).
    pub(crate) fn uncover(&self, memory: &mut [u8], range: Range<usize>) -> Result<()> {
        let end = self.image.bytes().clamp(range.start, range.end);
        if range.start < end {
            let file = Some((self.image.file(), range.start as u64));
            self.replace(memory, range.start..end, file)?;
        }
        if end < range.end {
            self.replace(memory, end..range.end, None)?;
        }
        Ok(())
    }

    /// Maps a file, or zeros, over `range`.
    fn replace(
        &self,
        memory: &mut [u8],
        range: Range<usize>,
        file: Option<(&File, u64)>,
    ) -> Result<()> {
        let is_own = memory.as_ptr().cast::<c_void>() == self.base().cast_const();
        assert!(is_own && range.end <= memory.len(), "the memory is this slot's");
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        let bytes = range.end - range.start;
        #[expect(unsafe_code, reason = "replaces mappings inside the slot's own reservation")]
        // SAFETY: the range lies in the accessible part of this slot (checked above), stays readable
        // and writable, and the exclusive borrow of `memory` keeps every other reference away.
        let result = unsafe {
            let at = self.base().byte_add(range.start);
            match file {
                Some((file, offset)) => rustix::mm::mmap(at, bytes, writable, flags, file, offset),
                None => rustix::mm::mmap_anonymous(at, bytes, writable, flags),
            }
        };
        result.map(drop).map_err(|e| Error::io("mapping a part of a session's memory", e.into()))
    }

    /// Gives back what the memory has grown by, for the next session of the image. What lies in the
    /// image's own range stays resident, whatever it holds.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the system refuses the mapping; the slot must not be used then.
    pub(crate) fn shrink(&mut self) -> Result<()> {
        let (start, end) = (self.image.bytes(), self.accessible.load(Ordering::Acquire));
        if start < end {
            #[expect(unsafe_code, reason = "replaces mappings inside the slot's own reservation")]
            // SAFETY: the range belongs to this slot's reservation, and with `&mut self` no
            // reference into the mapping exists.
            let result = unsafe {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                let at = self.base().byte_add(start);
                rustix::mm::mmap_anonymous(at, end - start, ProtFlags::empty(), flags)
            };
            result.map_err(|e| Error::io("giving back a session's memory", e.into()))?;
            self.accessible.store(start, Ordering::Release);
        }
        Ok(())
    }

    fn base(&self) -> *mut c_void {
        self.space.base.as_ptr().cast()
    }

    /// The ranges of bytes, in whole pages and ascending, that may differ from what is mapped; with
    /// `unprotected` those of them that may have changed since they were protected.
    ///
    /// # Errors
    ///
    /// When the kernel doesn't tell; the caller then has to compare.
    pub(crate) fn private_pages(
        &self,
        method: DirtyPages,
        unprotected: bool,
    ) -> io::Result<Vec<Range<usize>>> {
        let base = self.base() as usize;
        let end = base + self.accessible.load(Ordering::Acquire);
        let mut ranges = super::dirty::private_pages(method, base..end, unprotected)?;
        for range in &mut ranges {
            *range = range.start - base..range.end - base;
        }
        Ok(ranges)
    }

    /// Lets pages of `range` be protected.
    ///
    /// # Errors
    ///
    /// When the system can't.
    pub(crate) fn watch(&self, range: Range<usize>) -> io::Result<()> {
        let base = self.base() as usize;
        super::dirty::watch(base + range.start..base + range.end)
    }

    /// Protects pages of `range`: from now on they only count as unprotected when they are written.
    ///
    /// # Errors
    ///
    /// When the range isn't watched.
    pub(crate) fn protect(&self, range: Range<usize>) -> io::Result<()> {
        let base = self.base() as usize;
        super::dirty::protect(base + range.start..base + range.end)
    }
}

#[cfg(all(test, target_os = "linux"))]
impl Slot {
    pub(super) fn base_for_test(&self) -> usize {
        self.base() as usize
    }
}

/// A slot as the memory of a wasmtime instance.
struct SlotMemory(Arc<Slot>);

// SAFETY: the memory is page aligned, never moves (`RESERVATION` covers every growth), is followed
// by `GUARD` inaccessible bytes, and bytes beyond `byte_size` are inaccessible: `rewind` and
// `grow_to` are the only places that open pages, and both record it.
#[expect(unsafe_code, reason = "wasmtime's trait for host memories is unsafe")]
unsafe impl LinearMemory for SlotMemory {
    fn byte_size(&self) -> usize {
        self.0.accessible.load(Ordering::Acquire)
    }

    fn byte_capacity(&self) -> usize {
        RESERVATION
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        let old = self.byte_size();
        if new_size > RESERVATION || new_size < old {
            wasmtime::bail!("a memory of {old} bytes can't grow to {new_size}");
        }
        self.0.space.open(old..new_size)?;
        if new_size - old >= HUGE_GROWTH {
            self.0.space.prefer_huge_pages(old..new_size);
        }
        self.0.accessible.store(new_size, Ordering::Release);
        Ok(())
    }

    fn as_ptr(&self) -> *mut u8 {
        self.0.space.base.as_ptr()
    }
}

/// The engine's heap of exception objects.
struct GcMemory {
    space: Reservation,
    accessible: usize,
}

// SAFETY: as for `SlotMemory`, with `GC_RESERVATION` and `GC_GUARD`; the memory starts out zeroed.
#[expect(unsafe_code, reason = "wasmtime's trait for host memories is unsafe")]
unsafe impl LinearMemory for GcMemory {
    fn byte_size(&self) -> usize {
        self.accessible
    }

    fn byte_capacity(&self) -> usize {
        GC_RESERVATION
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        if new_size > GC_RESERVATION || new_size < self.accessible {
            wasmtime::bail!("a heap of {} bytes can't grow to {new_size}", self.accessible);
        }
        self.space.open(self.accessible..new_size)?;
        self.accessible = new_size;
        Ok(())
    }

    fn as_ptr(&self) -> *mut u8 {
        self.space.base.as_ptr()
    }
}

thread_local! {
    /// The slot for the memory that this thread creates next.
    static NEXT_SLOT: RefCell<Option<Arc<Slot>>> = const { RefCell::new(None) };
}

/// Runs `instantiate`, and hands `slot` to the first memory that it creates on this thread.
///
/// wasmtime's creator has no argument by which a store could name its slot; instantiating without
/// a start function is synchronous, so that the thread is one.
pub(crate) fn with_slot<T>(slot: &Arc<Slot>, instantiate: impl FnOnce() -> T) -> T {
    NEXT_SLOT.set(Some(Arc::clone(slot)));
    let result = instantiate();
    NEXT_SLOT.set(None);
    result
}

/// Gives slots to instances.
pub(crate) struct SlotCreator;

// SAFETY: see `SlotMemory`. Sizes are checked against what wasmtime asks for, so that compiled code
// that leaves bounds checks out finds the reservation and the guard that it was compiled for.
#[expect(unsafe_code, reason = "wasmtime's trait for memory creators is unsafe")]
unsafe impl MemoryCreator for SlotCreator {
    fn new_memory(
        &self,
        _ty: MemoryType,
        minimum: usize,
        _maximum: Option<usize>,
        reserved_size_in_bytes: Option<usize>,
        guard_size_in_bytes: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        match reserved_size_in_bytes {
            Some(RESERVATION) if guard_size_in_bytes <= GUARD => {}
            Some(GC_RESERVATION)
                if guard_size_in_bytes <= GC_GUARD && minimum <= GC_RESERVATION =>
            {
                let space = Reservation::new(GC_RESERVATION + GC_GUARD);
                let space = space.map_err(|e| format!("reserving an exception heap: {e}"))?;
                let mut memory = GcMemory { space, accessible: 0 };
                memory.grow_to(minimum).map_err(|e| format!("{e:#}"))?;
                return Ok(Box::new(memory));
            }
            other => return Err(format!("the engine wants a reservation of {other:?} bytes")),
        }
        let slot = NEXT_SLOT.take().ok_or("an instance was made without a slot")?;
        if slot.accessible.load(Ordering::Acquire) < minimum {
            return Err(format!(
                "the image is smaller than the module's memory of {minimum} bytes"
            ));
        }
        Ok(Box::new(SlotMemory(slot)))
    }
}
