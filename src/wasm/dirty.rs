//! Which pages of a private file mapping were written: what a checkpoint has to look at.
//!
//! Linux tells from a process's own `pagemap`: the `PAGEMAP_SCAN` ioctl (since 6.7) walks page tables
//! in the kernel and answers ranges; older kernels give one word per page to read. A page of a private
//! mapping is the guest's own when it is present (or swapped) and no longer backed by the file (Linux,
//! `Documentation/admin-guide/mm/pagemap.rst`). That are the pages written since the mapping was made.
//!
//! With `userfaultfd` (asynchronous write protection, since 6.7 as well) pages can be protected, which
//! the kernel undoes at the next write by itself, and the scan then leaves those out that are still
//! protected. A session protects what its cells don't write all the time, once it has enough of that:
//! for each protected page that is written the cell pays a fault, so that protecting everything would
//! cost cells what it saves checkpoints.
//!
//! Elsewhere nobody tells, and the caller compares with what is mapped.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod protect;

use std::io;
use std::ops::Range;

/// How written pages are found on this machine, for `kaa doctor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyPages {
    /// The `PAGEMAP_SCAN` ioctl, and write protection by `userfaultfd`: checkpoints look at pages
    /// written since the last one.
    Protect,
    /// The `PAGEMAP_SCAN` ioctl: checkpoints compare all pages that the session has written.
    Scan,
    /// Reading `/proc/self/pagemap`; otherwise as `Scan`.
    Pagemap,
    /// Comparing all memory with what was mapped.
    Compare,
}

/// The best way that works on this machine.
#[must_use]
pub fn dirty_pages_method() -> DirtyPages {
    #[cfg(target_os = "linux")]
    {
        if protect::works() { DirtyPages::Protect } else { linux::method() }
    }
    #[cfg(not(target_os = "linux"))]
    {
        DirtyPages::Compare
    }
}

/// The ranges in `addresses`, in whole pages and ascending, that are private copies; with
/// `unprotected` those of them that aren't protected.
pub(super) fn private_pages(
    method: DirtyPages,
    addresses: Range<usize>,
    unprotected: bool,
) -> io::Result<Vec<Range<usize>>> {
    #[cfg(target_os = "linux")]
    {
        linux::private_pages(method, addresses, unprotected)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (method, unprotected);
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("no page map for {addresses:?}")))
    }
}

/// Lets pages of a mapping be protected.
pub(super) fn watch(addresses: Range<usize>) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        protect::register(addresses)
    }
    #[cfg(not(target_os = "linux"))]
    {
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("no protection for {addresses:?}")))
    }
}

/// Protects pages of a mapping that is watched, until they are written.
pub(super) fn protect(addresses: Range<usize>) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        protect::protect(addresses)
    }
    #[cfg(not(target_os = "linux"))]
    {
        watch(addresses)
    }
}
