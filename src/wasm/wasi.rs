//! WASI as a session gets it: wasmtime-wasi, with Kaa in front where a limit or a route applies.

mod paths;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use futures_util::FutureExt;
use wasmtime::{Caller, Linker, Result};
use wasmtime_wasi::p1::wasi_snapshot_preview1::{self as preview1, WasiSnapshotPreview1};
use wasmtime_wasi::p1::{self, WasiP1Ctx};
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};
use wiggle::GuestMemory;

use super::clock::{VirtualClock, VirtualMonotonicClock, VirtualWallClock, poll_oneoff};
use super::guest::{Guest, charge_call, guest_slice, read_u32, write_u32};
use super::random::{SeededRandom, SeededRng};
use crate::error::Error;
use crate::policy::Policy;

const MODULE: &str = "wasi_snapshot_preview1";
/// Error numbers of WASI preview 1 (`typenames.witx`, `errno`).
pub(super) const ERRNO_SUCCESS: i32 = 0;
pub(super) const ERRNO_FAULT: i32 = 21;
pub(super) const ERRNO_INVAL: i32 = 28;
const ERRNO_NOSPC: i32 = 51;
const ERRNO_PERM: i32 = 63;
/// Bytes that one call may make the host copy.
const HOSTCALL_BYTES_MAX: usize = 128 << 20;
/// Bytes of a file that one call reads or writes: whoever wants more gets a short read or write, as POSIX
/// has them, and calls again. wasmtime-wasi would refuse it.
const FILE_BYTES_MAX: u32 = 64 << 20;
const _: () = assert!((FILE_BYTES_MAX as usize) < HOSTCALL_BYTES_MAX, "the array is counted too");
/// Buffers that one `fd_write` may name; POSIX asks for at least 16 (`IOV_MAX`).
const IOVECS_MAX: u32 = 1024;
/// Fuel of a random byte of a session with a seed, which is the thirty-second part of a hash.
const SEEDED_BYTE_FUEL: u64 = 64;

/// Guest paths below which everything is the session's own.
const OWN_PATHS: &[&str] = &["/tmp/", "/usr/local/lib/"];

/// Whether the guest's C library hands on paths that lead to a mount there: it looks for its own directories
/// first, and what is written in two ways is found in one of them only.
fn is_reachable(guest: &str) -> bool {
    let plain = guest.trim_end_matches('/');
    let mut parts = plain.split('/').skip(1);
    parts.all(|part| !matches!(part, "" | "."))
        && !OWN_PATHS.iter().any(|own| plain.starts_with(own))
}

/// Where a session's directories lie on the host.
pub(crate) struct Directories<'host> {
    /// Holds the standard library's zip.
    pub(crate) stdlib: &'host Path,
    /// The session's scratch.
    pub(crate) scratch: &'host Path,
    /// An empty directory.
    pub(crate) root: &'host Path,
}

/// The WASI context of a session: nothing but its own directories and what the policy grants.
///
/// # Errors
///
/// [`Error::Invalid`] naming a mount whose host directory can't be opened, or that would not be found.
pub(crate) fn context(
    directories: &Directories<'_>,
    policy: &Policy,
    clock: Option<&Arc<VirtualClock>>,
    random: Option<&Arc<SeededRandom>>,
) -> crate::error::Result<WasiP1Ctx> {
    if let Some(mount) = policy.mounts.iter().find(|mount| !is_reachable(&mount.guest)) {
        let reason =
            "choose a guest path outside of /tmp and /usr/local/lib, without `.` or `//` in it";
        return Err(Error::invalid(format!("mount at `{}`", mount.guest), reason));
    }
    let mut builder = WasiCtxBuilder::new();
    builder
        .arg("/usr/local/bin/python.wasm")
        .env("HOME", "/tmp")
        .env("TMPDIR", "/tmp")
        .env("PYTHONTZPATH", "")
        .envs(&policy.env)
        // The session's own files are local and small; with mounts nobody knows.
        .allow_blocking_current_thread(policy.mounts.is_empty());
    let mut open = |host: &Path, guest: &str, perms| {
        let opened = builder.preopened_dir(host, guest, perms).map(|_| ());
        opened
            .map_err(|e| Error::invalid(format!("directory {}", host.display()), format!("{e:#}")))
    };
    // in the order that `files::ROOT_FD` counts on, which is baked into every image.
    open(directories.stdlib, "/usr/local/lib", FsPerms::ReadOnly)?;
    open(directories.scratch, "/tmp", FsPerms::ReadWrite)?;
    open(directories.root, "/", FsPerms::ReadOnly)?;
    for mount in &policy.mounts {
        let perms = if mount.writable { FsPerms::ReadWrite } else { FsPerms::ReadOnly };
        open(&mount.host, &mount.guest, perms)?;
    }
    if let Some(random) = random {
        builder.secure_random(SeededRng(Arc::clone(random)));
        builder.insecure_random(SeededRng(Arc::clone(random)));
    }
    if let Some(clock) = clock {
        builder.wall_clock(VirtualWallClock(Arc::clone(clock)));
        builder.monotonic_clock(VirtualMonotonicClock(Arc::clone(clock)));
    }
    Ok(builder.build_p1())
}

/// The guest's memory and wasmtime-wasi's context, borrowed together for one call, which is charged.
pub(super) fn parts<'caller>(
    caller: &'caller mut Caller<'_, Guest>,
) -> Result<(GuestMemory<'caller>, &'caller mut Guest)> {
    charge_call(caller, 0)?;
    let memory = caller.data().handles()?.memory;
    let (bytes, guest) = memory.data_and_store_mut(caller);
    // The functions of wasmtime-wasi count what they copy against this; its own linker sets it anew
    // before every call.
    WasiSnapshotPreview1::set_hostcall_fuel(&mut guest.wasi, HOSTCALL_BYTES_MAX);
    Ok((GuestMemory::Unshared(bytes), guest))
}

/// Makes room for what a call makes; `false` is "no space left". Whoever has filled the disk makes the host
/// look for room again and again, so this is charged as a call, also when nothing comes of it.
pub(super) fn reserve(caller: &mut Caller<'_, Guest>, fd: i32, bytes: u64) -> Result<bool> {
    charge_call(caller, 0)?;
    Ok(caller.data_mut().files.reserve(fd as u32, bytes))
}

/// Adds WASI, and then Kaa's own versions of what it guards.
///
/// # Errors
///
/// When the linker refuses a definition.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> Result<()> {
    p1::add_to_linker_async(linker, |guest: &mut Guest| &mut guest.wasi)?;
    linker.allow_shadowing(true);
    add_reads(linker)?;
    add_descriptors(linker)?;
    add_writes(linker)?;
    paths::add_to_linker(linker)?;
    linker.func_wrap_async(
        MODULE,
        "poll_oneoff",
        |caller: Caller<'_, Guest>, (subs, events, count, out): (i32, i32, i32, i32)| {
            Box::new(poll_oneoff(caller, subs, events, count, out))
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Functions that are charged, and long reads made shorter: what they cost the host is time.
fn add_reads(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "fd_read",
        |mut caller: Caller<'_, Guest>, (fd, iovs, count, out): (i32, i32, i32, i32)| {
            Box::new(async move {
                let shortened = shorten(&mut caller, iovs, count)?;
                let (mut memory, guest) = parts(&mut caller)?;
                let read =
                    preview1::fd_read(&mut guest.wasi, &mut memory, fd, iovs, count, out).await;
                put_back(&mut caller, shortened)?;
                read
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "fd_pread",
        |mut caller: Caller<'_, Guest>, (fd, iovs, count, at, out): (i32, i32, i32, i64, i32)| {
            Box::new(async move {
                let shortened = shorten(&mut caller, iovs, count)?;
                let (mut memory, guest) = parts(&mut caller)?;
                let read =
                    preview1::fd_pread(&mut guest.wasi, &mut memory, fd, iovs, count, at, out)
                        .await;
                put_back(&mut caller, shortened)?;
                read
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "fd_readdir",
        |mut caller: Caller<'_, Guest>, (fd, buf, len, cookie, out): (i32, i32, i32, i64, i32)| {
            Box::new(async move {
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::fd_readdir(&mut guest.wasi, &mut memory, fd, buf, len, cookie, out).await
            })
        },
    )?;
    linker.func_wrap_async(MODULE, "fd_sync", |mut caller: Caller<'_, Guest>, (fd,): (i32,)| {
        Box::new(async move {
            let (mut memory, guest) = parts(&mut caller)?;
            preview1::fd_sync(&mut guest.wasi, &mut memory, fd).await
        })
    })?;
    linker.func_wrap_async(
        MODULE,
        "fd_datasync",
        |mut caller: Caller<'_, Guest>, (fd,): (i32,)| {
            Box::new(async move {
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::fd_datasync(&mut guest.wasi, &mut memory, fd).await
            })
        },
    )?;
    linker.func_wrap(
        MODULE,
        "random_get",
        |mut caller: Caller<'_, Guest>, buf: i32, len: i32| -> Result<i32> {
            let each = if caller.data().random.is_some() { SEEDED_BYTE_FUEL } else { 1 };
            charge_call(&mut caller, u64::from(len as u32) * each)?;
            let (mut memory, guest) = parts(&mut caller)?;
            preview1::random_get(&mut guest.wasi, &mut memory, buf, len)
        },
    )?;
    Ok(())
}

/// Functions that close and renumber descriptors: the account follows them, and those that every session
/// starts with stay.
fn add_descriptors(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "fd_close",
        |mut caller: Caller<'_, Guest>, (fd,): (i32,)| {
            Box::new(async move {
                if !caller.data().files.is_own(fd as u32) {
                    return Ok(ERRNO_PERM);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                let errno = preview1::fd_close(&mut guest.wasi, &mut memory, fd).await?;
                if errno == ERRNO_SUCCESS {
                    guest.files.closed(fd as u32);
                }
                Ok(errno)
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "fd_renumber",
        |mut caller: Caller<'_, Guest>, (from, to): (i32, i32)| {
            Box::new(async move {
                let files = &caller.data().files;
                if !files.is_own(from as u32) || !files.is_own(to as u32) {
                    return Ok(ERRNO_PERM);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                let errno = preview1::fd_renumber(&mut guest.wasi, &mut memory, from, to).await?;
                if errno == ERRNO_SUCCESS {
                    guest.files.renumbered(from as u32, to as u32);
                }
                Ok(errno)
            })
        },
    )?;
    Ok(())
}

fn add_writes(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "fd_write",
        |caller: Caller<'_, Guest>, (fd, iovs, count, out): (i32, i32, i32, i32)| {
            Box::new(fd_write(caller, fd, iovs, count, out))
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "fd_pwrite",
        |mut caller: Caller<'_, Guest>, (fd, iovs, count, at, out): (i32, i32, i32, i64, i32)| {
            Box::new(async move {
                let shortened = shorten(&mut caller, iovs, count)?;
                let written = write_file(&mut caller, fd, iovs, count, Some(at), out).await;
                put_back(&mut caller, shortened)?;
                written
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "fd_filestat_set_size",
        |mut caller: Caller<'_, Guest>, (fd, size): (i32, i64)| {
            Box::new(async move {
                if !reserve(&mut caller, fd, size as u64)? {
                    return Ok(ERRNO_NOSPC);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::fd_filestat_set_size(&mut guest.wasi, &mut memory, fd, size).await
            })
        },
    )?;
    linker.func_wrap(
        MODULE,
        "fd_allocate",
        |mut caller: Caller<'_, Guest>, fd: i32, at: i64, len: i64| -> Result<i32> {
            let bytes = (at as u64).saturating_add(len as u64);
            if !reserve(&mut caller, fd, bytes)? {
                return Ok(ERRNO_NOSPC);
            }
            let (mut memory, guest) = parts(&mut caller)?;
            preview1::fd_allocate(&mut guest.wasi, &mut memory, fd, at, len)
        },
    )?;
    Ok(())
}

/// What an array of buffers holds, in bytes; `None` when it isn't in memory.
fn written_bytes(caller: &mut Caller<'_, Guest>, iovs: i32, count: i32) -> Result<Option<u64>> {
    let memory = caller.data().handles()?.memory;
    let bytes = memory.data(&*caller);
    let sum = (0..(count as u32).min(IOVECS_MAX)).try_fold(0u64, |sum, at| {
        let entry = (iovs as u32).checked_add(at.checked_mul(8)?)?;
        Some(sum + u64::from(read_u32(bytes, entry.checked_add(4)?)?))
    });
    Ok(sum.filter(|_| count as u32 <= IOVECS_MAX))
}

/// The length of a buffer in the guest's memory, and where it stands.
struct Shortened {
    at: u32,
    bytes: u32,
}

/// Makes the first buffer of an array that isn't empty, the only one that a call of a file uses, no longer than
/// [`FILE_BYTES_MAX`]. The guest waits meanwhile, and a call that is dropped is rolled back.
fn shorten(caller: &mut Caller<'_, Guest>, iovs: i32, count: i32) -> Result<Option<Shortened>> {
    let memory = caller.data().handles()?.memory;
    let memory = memory.data_mut(&mut *caller);
    let mut lengths = (0..(count as u32).min(IOVECS_MAX)).map_while(|number| {
        let at = (iovs as u32).checked_add(number * 8 + 4)?;
        Some(Shortened { at, bytes: read_u32(memory, at)? })
    });
    let first = lengths.find(|length| length.bytes > 0);
    let long = first.filter(|length| length.bytes > FILE_BYTES_MAX);
    Ok(long.filter(|length| write_u32(memory, length.at, FILE_BYTES_MAX)))
}

fn put_back(caller: &mut Caller<'_, Guest>, shortened: Option<Shortened>) -> Result<()> {
    if let Some(Shortened { at, bytes }) = shortened {
        let memory = caller.data().handles()?.memory;
        let memory = memory.data_mut(&mut *caller);
        write_u32(memory, at, bytes);
    }
    Ok(())
}

/// `fd_write` of a file, and `fd_pwrite` where there is an offset.
async fn write_file(
    caller: &mut Caller<'_, Guest>,
    fd: i32,
    iovs: i32,
    count: i32,
    offset: Option<i64>,
    out: i32,
) -> Result<i32> {
    let Some(bytes) = written_bytes(caller, iovs, count)? else { return Ok(ERRNO_FAULT) };
    charge_call(caller, bytes)?;
    if !caller.data_mut().files.reserve(fd as u32, bytes) {
        return Ok(ERRNO_NOSPC);
    }
    let (mut memory, guest) = parts(caller)?;
    let (wasi, memory) = (&mut guest.wasi, &mut memory);
    match offset {
        Some(at) => preview1::fd_pwrite(wasi, memory, fd, iovs, count, at, out).await,
        None => preview1::fd_write(wasi, memory, fd, iovs, count, out).await,
    }
}

/// `fd_write`: the two streams are captured here, files are charged.
async fn fd_write(
    mut caller: Caller<'_, Guest>,
    fd: i32,
    iovs: i32,
    count: i32,
    out: i32,
) -> Result<i32> {
    if !matches!(fd, 1 | 2) {
        let shortened = shorten(&mut caller, iovs, count)?;
        let written = write_file(&mut caller, fd, iovs, count, None, out).await;
        put_back(&mut caller, shortened)?;
        return written;
    }
    let Some(bytes) = written_bytes(&mut caller, iovs, count)? else { return Ok(ERRNO_FAULT) };
    charge_call(&mut caller, bytes)?;
    let memory = caller.data().handles()?.memory;
    let (memory, guest) = memory.data_and_store_mut(&mut caller);
    let stream = if fd == 1 { &mut guest.streams.stdout } else { &mut guest.streams.stderr };
    let mut total = 0u32;
    for at in 0..count as u32 {
        let entry = iovs as u32 + at * 8;
        let buffer = read_u32(memory, entry)
            .zip(read_u32(memory, entry + 4))
            .and_then(|(ptr, len)| guest_slice(memory, ptr, len));
        let Some(buffer) = buffer else { return Ok(ERRNO_FAULT) };
        let Some(sum) = total.checked_add(buffer.len() as u32) else { return Ok(ERRNO_INVAL) };
        total = sum;
        stream.write(buffer);
    }
    Ok(if write_u32(memory, out as u32, total) { ERRNO_SUCCESS } else { ERRNO_FAULT })
}

/// Closes what the guest opened since its checkpoint: nothing in the memory that it goes back to
/// knows these descriptors.
pub(crate) fn close_since_checkpoint(guest: &mut Guest) {
    let fds = guest.files.since_checkpoint();
    close(guest, fds);
}

/// Closes everything that the guest has open.
pub(crate) fn close_all(guest: &mut Guest) {
    let fds = guest.files.open_fds();
    close(guest, fds);
}

fn close(guest: &mut Guest, fds: Vec<u32>) {
    for fd in fds {
        let mut nothing = GuestMemory::Unshared(&mut []);
        // Closing waits for nothing.
        let _ = preview1::fd_close(&mut guest.wasi, &mut nothing, fd as i32).now_or_never();
        guest.files.closed(fd);
    }
}
