//! The page map of Linux.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::ioctl;

use super::DirtyPages;

/// Bits of a `pagemap` word.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;

/// Categories of `PAGEMAP_SCAN` (`include/uapi/linux/fs.h`).
/// Not write-protected.
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const SCAN: ioctl::Opcode = ioctl::opcode::read_write::<ScanArg>(b'f', 16);

struct Pagemap {
    file: File,
    scan: bool,
}

fn pagemap() -> io::Result<&'static Pagemap> {
    static PAGEMAP: OnceLock<Option<Pagemap>> = OnceLock::new();
    let open = || {
        let file = File::open("/proc/self/pagemap").ok()?;
        let probe = [0u8; 1];
        let page = probe.as_ptr() as usize & !(rustix::param::page_size() - 1);
        let scan = scan(&file, page..page + rustix::param::page_size(), false).is_ok();
        Some(Pagemap { file, scan })
    };
    PAGEMAP.get_or_init(open).as_ref().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

pub(super) fn method() -> DirtyPages {
    match pagemap() {
        Ok(Pagemap { scan: true, .. }) => DirtyPages::Scan,
        Ok(_) => DirtyPages::Pagemap,
        Err(_) => DirtyPages::Compare,
    }
}

pub(super) fn private_pages(
    method: DirtyPages,
    addresses: Range<usize>,
    unprotected: bool,
) -> io::Result<Vec<Range<usize>>> {
    let file = &pagemap()?.file;
    match method {
        DirtyPages::Protect | DirtyPages::Scan => scan(file, addresses, unprotected),
        DirtyPages::Pagemap => read(file, addresses),
        DirtyPages::Compare => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Asks the kernel for ranges.
fn scan(file: &File, addresses: Range<usize>, unprotected: bool) -> io::Result<Vec<Range<usize>>> {
    let written = if unprotected { PAGE_IS_WRITTEN } else { 0 };
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut regions = [PageRegion::default(); 256];
    let mut start = addresses.start as u64;
    while start < addresses.end as u64 {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start,
            end: addresses.end as u64,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            // Not file-backed, not the shared zero page, and present or swapped.
            category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO | written,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
        };
        #[expect(unsafe_code, reason = "an ioctl that rustix has no wrapper for")]
        // SAFETY: the opcode belongs to a structure of `ScanArg`'s layout, and `vec` with
        // `vec_len` describe `regions`, which outlives the call. Without write flags the ioctl
        // changes nothing but `arg` and `regions`.
        let count = unsafe { ioctl::ioctl(file, ScanCall(&mut arg)) }?;
        for region in &regions[..count.min(regions.len())] {
            let range = region.start as usize..region.end as usize;
            match found.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => found.push(range),
            }
        }
        if arg.walk_end <= start {
            break;
        }
        start = arg.walk_end;
    }
    Ok(found)
}

/// `PAGEMAP_SCAN` with its answer: how many regions were filled in.
struct ScanCall<'arg>(&'arg mut ScanArg);

// SAFETY: opcode, pointer and output agree with the kernel's definition of `PAGEMAP_SCAN`.
#[expect(unsafe_code, reason = "rustix's trait for ioctls is unsafe")]
unsafe impl ioctl::Ioctl for ScanCall<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> ioctl::Opcode {
        SCAN
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    #[expect(unsafe_code, reason = "the signature is rustix's")]
    unsafe fn output_from_ptr(
        out: ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        Ok(usize::try_from(out).unwrap_or(0))
    }
}

/// Reads a word per page.
fn read(file: &File, addresses: Range<usize>) -> io::Result<Vec<Range<usize>>> {
    const WORDS: usize = 8192;
    let page = rustix::param::page_size();
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut buffer = vec![0u8; WORDS * 8];
    let mut at = addresses.start;
    while at < addresses.end {
        let words = ((addresses.end - at) / page).min(WORDS);
        file.read_exact_at(&mut buffer[..words * 8], (at / page * 8) as u64)?;
        for word in buffer[..words * 8].chunks_exact(8) {
            let word = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
            if word & (PRESENT | SWAPPED) != 0 && word & FILE == 0 {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end = at + page,
                    _ => found.push(at..at + page),
                }
            }
            at += page;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wasm::memory::{MemoryImage, Slot, WASM_PAGE};
    use std::sync::Arc;

    #[test]
    fn both_ways_find_the_pages_that_were_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * WASM_PAGE as u64).unwrap();
        let image = Arc::new(MemoryImage::new(file, 4 * WASM_PAGE).unwrap());
        let mut slot = Slot::new(Arc::clone(&image)).unwrap();
        assert!(slot.private_pages(method(), false).unwrap().is_empty());
        let base = slot.base_for_test();
        for offset in [0, 8192, 12288, 3 * WASM_PAGE] {
            #[expect(unsafe_code, reason = "writes as a guest would")]
            // SAFETY: the offsets lie in the accessible part of a slot that no instance has.
            unsafe {
                let at = (base + offset) as *mut u8;
                let _ = at.read_volatile();
                at.write_volatile(1);
            }
        }
        let pages = [0..4096, 8192..16384, 3 * WASM_PAGE..3 * WASM_PAGE + 4096];
        assert_eq!(slot.private_pages(method(), false).unwrap(), pages);
        let pagemap = pagemap().unwrap();
        let by_words = read(&pagemap.file, base..base + 4 * WASM_PAGE).unwrap();
        let relative: Vec<_> = by_words.iter().map(|r| r.start - base..r.end - base).collect();
        assert_eq!(relative, pages);
        if super::super::dirty_pages_method() == DirtyPages::Protect {
            slot.watch(0..4 * WASM_PAGE).unwrap();
            slot.protect(8192..12288).unwrap();
            slot.protect(3 * WASM_PAGE..3 * WASM_PAGE + 4096).unwrap();
            let unprotected = || slot.private_pages(DirtyPages::Protect, true).unwrap();
            assert_eq!(unprotected(), [0..4096, 12288..16384]);
            #[expect(unsafe_code, reason = "writes as a guest would")]
            // SAFETY: as above.
            unsafe {
                ((base + 3 * WASM_PAGE + 8) as *mut u8).write_volatile(2);
            }
            assert_eq!(unprotected().last(), pages.last(), "writing undoes the protection");
            let all = slot.private_pages(DirtyPages::Protect, false).unwrap();
            assert_eq!(all, pages, "protected pages are private all the same");
        }
        slot.rewind(&image, 4 * WASM_PAGE).unwrap();
        assert!(slot.private_pages(method(), false).unwrap().is_empty());
    }
}
