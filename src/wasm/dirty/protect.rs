//! Write protection that the kernel undoes at the first write: `userfaultfd` with
//! `UFFD_FEATURE_WP_ASYNC` (Linux, `Documentation/admin-guide/mm/userfaultfd.rst`).

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::ioctl;
use rustix::mm::UserfaultfdFlags;

use super::super::memory::Reservation;
use super::DirtyPages;
use super::linux::private_pages;

/// `include/uapi/linux/userfaultfd.h`.
const UFFD_API: u64 = 0xaa;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const TYPE: u8 = 0xaa;

/// `struct uffdio_api`: API, features, ioctls.
type Api = [u64; 3];
/// `struct uffdio_register`: start, length, mode, ioctls.
type Register = [u64; 4];
/// `struct uffdio_writeprotect`: start, length, mode.
type WriteProtect = [u64; 3];

const API: ioctl::Opcode = ioctl::opcode::read_write::<Api>(TYPE, 0x3f);
const REGISTER: ioctl::Opcode = ioctl::opcode::read_write::<Register>(TYPE, 0x00);
const WRITEPROTECT: ioctl::Opcode = ioctl::opcode::read_write::<WriteProtect>(TYPE, 0x06);

/// Whether this system does it for us.
pub(super) fn works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| probe().unwrap_or(false))
}

/// Protects a page and looks whether a write is seen.
fn probe() -> io::Result<bool> {
    let page = rustix::param::page_size();
    let mut space = Reservation::new(page)?;
    space.open(0..page)?;
    space.words(0..8)[0] = 1;
    register(space.addresses())?;
    protect(space.addresses())?;
    let unprotected = || private_pages(DirtyPages::Scan, space.addresses(), true);
    let before = unprotected()?;
    let after = {
        space.words(0..8)[0] = 2;
        private_pages(DirtyPages::Scan, space.addresses(), true)?
    };
    Ok(before.is_empty() && after == [space.addresses()])
}

/// The descriptor of this process: it is about its own memory only.
fn userfaultfd() -> io::Result<&'static OwnedFd> {
    static FD: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let open = || {
        // What needs no privilege; nobody ever reads from it.
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(1);
        #[expect(unsafe_code, reason = "rustix calls it unsafe for what a handler could do")]
        // SAFETY: asynchronous write protection is the only feature that is asked for, and no
        // message is ever answered: no contents of any memory change.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }.ok()?;
        control(&fd, API, &mut [UFFD_API, FEATURE_WP_ASYNC, 0]).ok()?;
        Some(fd)
    };
    FD.get_or_init(open).as_ref().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// Lets pages in `addresses` be protected.
pub(super) fn register(addresses: Range<usize>) -> io::Result<()> {
    let (start, bytes) = (addresses.start as u64, addresses.len() as u64);
    control(userfaultfd()?, REGISTER, &mut [start, bytes, REGISTER_MODE_WP, 0])
}

/// Protects the pages in `addresses` until they are written.
pub(super) fn protect(addresses: Range<usize>) -> io::Result<()> {
    let (start, bytes) = (addresses.start as u64, addresses.len() as u64);
    control(userfaultfd()?, WRITEPROTECT, &mut [start, bytes, WRITEPROTECT_MODE_WP])
}

fn control<const N: usize>(
    fd: &OwnedFd,
    opcode: ioctl::Opcode,
    argument: &mut [u64; N],
) -> io::Result<()> {
    #[expect(unsafe_code, reason = "ioctls that rustix has no wrapper for")]
    // SAFETY: each opcode above is made with the size of the array that its callers pass, which
    // outlives the call. None of these ioctls changes contents of memory; they take place in ranges
    // that the callers own, and at worst a later write there costs a fault.
    unsafe { ioctl::ioctl(fd, Control { opcode, argument }) }?;
    Ok(())
}

struct Control<'argument, const N: usize> {
    opcode: ioctl::Opcode,
    argument: &'argument mut [u64; N],
}

// SAFETY: opcode and pointer agree with the kernel's definitions: see the types above.
#[expect(unsafe_code, reason = "rustix's trait for ioctls is unsafe")]
unsafe impl<const N: usize> ioctl::Ioctl for Control<'_, N> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> ioctl::Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.argument).cast()
    }

    #[expect(unsafe_code, reason = "the signature is rustix's")]
    unsafe fn output_from_ptr(_: ioctl::IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}
