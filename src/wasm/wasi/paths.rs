//! Functions that take a path: each is bounded, goes on in the mount that it leads to, and is charged
//! for what it makes.

use wasmtime::{Caller, Linker, Result};
use wasmtime_wasi::p1::wasi_snapshot_preview1::{self as preview1, WasiSnapshotPreview1};
use wiggle::GuestMemory;

use super::{ERRNO_NOSPC, ERRNO_SUCCESS, HOSTCALL_BYTES_MAX, MODULE, parts, reserve};
use crate::wasm::files::{DIRECTORY_BYTES, FILE_BYTES};
use crate::wasm::guest::{Guest, guest_slice, read_u32};

const ERRNO_ACCES: i32 = 2;
const ERRNO_MFILE: i32 = 33;
const ERRNO_NAMETOOLONG: i32 = 37;
const ERRNO_XDEV: i32 = 75;
/// The longest path that the host looks at, as in Linux (`PATH_MAX`). Where the kernel doesn't keep paths
/// below a directory by itself, each of their parts is a system call.
const PATH_BYTES_MAX: u32 = 4096;
/// What is remembered of the name of an open file, for messages.
const OPEN_NAME_BYTES: usize = 256;
/// `oflags.creat` of `path_open`.
const OFLAGS_CREAT: i32 = 1;
/// Size of a `filestat`, and where in it the type is.
const FILESTAT_BYTES: usize = 64;
const FILESTAT_TYPE: usize = 16;
/// Types that are opened without a wait: directory, regular file, symbolic link.
const PLAIN_TYPES: &[u8] = &[3, 4, 7];

/// Adds the functions, in the place of those of wasmtime-wasi.
pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_open",
        |caller: Caller<'_, Guest>, args: (i32, i32, i32, i32, i32, i64, i64, i32, i32)| {
            Box::new(path_open(caller, args))
        },
    )?;
    add_path_changes(linker)?;
    add_times(linker)?;
    add_path_queries(linker)?;
    add_pairs_of_paths(linker)?;
    add_symlink(linker)
}

/// Where a path that the guest names goes on: see `Files::route`. `None` for one that is too long.
fn route(
    caller: &mut Caller<'_, Guest>,
    fd: i32,
    ptr: i32,
    len: i32,
) -> Result<Option<(i32, i32, i32)>> {
    if len as u32 > PATH_BYTES_MAX {
        return Ok(None);
    }
    let memory = caller.data().handles()?.memory;
    let (bytes, guest) = memory.data_and_store_mut(caller);
    let (ptr, len) = (ptr as u32, len as u32);
    // What isn't in memory is left to wasmtime-wasi to refuse.
    let (fd, ptr, len) = match guest_slice(bytes, ptr, len) {
        Some(path) => guest.files.route(fd as u32, path, ptr),
        None => (fd as u32, ptr, len),
    };
    Ok(Some((fd as i32, ptr as i32, len as i32)))
}

/// Functions of one path that change something: routed, and charged when they make something.
fn add_path_changes(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_create_directory",
        |mut caller: Caller<'_, Guest>, (fd, ptr, len): (i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                if !reserve(&mut caller, fd, DIRECTORY_BYTES)? {
                    return Ok(ERRNO_NOSPC);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::path_create_directory(&mut guest.wasi, &mut memory, fd, ptr, len).await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "path_remove_directory",
        |mut caller: Caller<'_, Guest>, (fd, ptr, len): (i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::path_remove_directory(&mut guest.wasi, &mut memory, fd, ptr, len).await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "path_unlink_file",
        |mut caller: Caller<'_, Guest>, (fd, ptr, len): (i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                caller.data_mut().files.removed();
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::path_unlink_file(&mut guest.wasi, &mut memory, fd, ptr, len).await
            })
        },
    )?;
    Ok(())
}

/// `path_filestat_set_times`: routed.
fn add_times(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_filestat_set_times",
        |mut caller: Caller<'_, Guest>,
         (fd, flags, ptr, len, atim, mtim, fst): (i32, i32, i32, i32, i64, i64, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let (mut memory, guest) = parts(&mut caller)?;
                let wasi = &mut guest.wasi;
                preview1::path_filestat_set_times(
                    wasi,
                    &mut memory,
                    fd,
                    flags,
                    ptr,
                    len,
                    atim,
                    mtim,
                    fst,
                )
                .await
            })
        },
    )?;
    Ok(())
}

/// Functions of one path that only look: routed.
fn add_path_queries(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_filestat_get",
        |mut caller: Caller<'_, Guest>, (fd, flags, ptr, len, out): (i32, i32, i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let (mut memory, guest) = parts(&mut caller)?;
                let wasi = &mut guest.wasi;
                preview1::path_filestat_get(wasi, &mut memory, fd, flags, ptr, len, out).await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "path_readlink",
        |mut caller: Caller<'_, Guest>,
         (fd, ptr, len, buf, buf_len, out): (i32, i32, i32, i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let (mut memory, guest) = parts(&mut caller)?;
                let wasi = &mut guest.wasi;
                preview1::path_readlink(wasi, &mut memory, fd, ptr, len, buf, buf_len, out).await
            })
        },
    )?;
    Ok(())
}

async fn path_open(
    mut caller: Caller<'_, Guest>,
    (fd, dirflags, ptr, len, oflags, rights, inheriting, fdflags, out): (
        i32,
        i32,
        i32,
        i32,
        i32,
        i64,
        i64,
        i32,
        i32,
    ),
) -> Result<i32> {
    let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
        return Ok(ERRNO_NAMETOOLONG);
    };
    if !caller.data().files.may_open() {
        return Ok(ERRNO_MFILE);
    }
    if oflags & OFLAGS_CREAT != 0 && !reserve(&mut caller, fd, FILE_BYTES)? {
        return Ok(ERRNO_NOSPC);
    }
    if !opens_at_once(&mut caller, (fd, dirflags, ptr, len)).await? {
        return Ok(ERRNO_ACCES);
    }
    let (mut memory, guest) = parts(&mut caller)?;
    let wasi = &mut guest.wasi;
    let errno = preview1::path_open(
        wasi,
        &mut memory,
        fd,
        dirflags,
        ptr,
        len,
        oflags,
        rights,
        inheriting,
        fdflags,
        out,
    )
    .await?;
    if errno == ERRNO_SUCCESS {
        let memory = caller.data().handles()?.memory;
        let (memory, guest) = memory.data_and_store_mut(&mut caller);
        if let Some(opened) = read_u32(memory, out as u32) {
            let name = guest_slice(memory, ptr as u32, len as u32).unwrap_or_default();
            let name = &name[..name.len().min(OPEN_NAME_BYTES)];
            let name = String::from_utf8_lossy(name);
            let path = format!("{}/{name}", guest.files.directory_path(fd as u32));
            guest.files.opened(fd as u32, opened, path);
        }
    }
    Ok(errno)
}

/// Whether a path names no pipe and no device: to open one of those is to wait for somebody else, where no
/// limit reaches. The guest can't make any, but a mount may have them.
async fn opens_at_once(
    caller: &mut Caller<'_, Guest>,
    (fd, dirflags, ptr, len): (i32, i32, i32, i32),
) -> Result<bool> {
    let memory = caller.data().handles()?.memory;
    let (memory, guest) = memory.data_and_store_mut(caller);
    // What isn't in memory is refused by whoever opens it.
    let path = guest_slice(memory, ptr as u32, len as u32);
    let Some(path) = path.filter(|_| guest.files.is_mount(fd as u32)) else { return Ok(true) };
    // A memory of its own: there is no place in the guest's for the answer.
    let mut own = [&[0; FILESTAT_BYTES], path].concat();
    WasiSnapshotPreview1::set_hostcall_fuel(&mut guest.wasi, HOSTCALL_BYTES_MAX);
    let (wasi, at) = (&mut guest.wasi, FILESTAT_BYTES as i32);
    let mut memory = GuestMemory::Unshared(&mut own);
    let errno = preview1::path_filestat_get(wasi, &mut memory, fd, dirflags, at, len, 0).await?;
    Ok(errno != ERRNO_SUCCESS || PLAIN_TYPES.contains(&own[FILESTAT_TYPE]))
}

/// Functions of two paths.
fn add_pairs_of_paths(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_rename",
        |mut caller: Caller<'_, Guest>,
         (fd, ptr, len, to_fd, to_ptr, to_len): (i32, i32, i32, i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let Some((to_fd, to_ptr, to_len)) = route(&mut caller, to_fd, to_ptr, to_len)?
                else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let files = &mut caller.data_mut().files;
                if files.are_apart(fd as u32, to_fd as u32) {
                    return Ok(ERRNO_XDEV);
                }
                files.removed();
                let (mut memory, guest) = parts(&mut caller)?;
                let wasi = &mut guest.wasi;
                preview1::path_rename(wasi, &mut memory, fd, ptr, len, to_fd, to_ptr, to_len).await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "path_link",
        |mut caller: Caller<'_, Guest>,
         (fd, flags, ptr, len, to_fd, to_ptr, to_len): (i32, i32, i32, i32, i32, i32, i32)| {
            Box::new(async move {
                let Some((fd, ptr, len)) = route(&mut caller, fd, ptr, len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                let Some((to_fd, to_ptr, to_len)) = route(&mut caller, to_fd, to_ptr, to_len)?
                else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                if caller.data().files.are_apart(fd as u32, to_fd as u32) {
                    return Ok(ERRNO_XDEV);
                }
                if !reserve(&mut caller, to_fd, FILE_BYTES)? {
                    return Ok(ERRNO_NOSPC);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                let wasi = &mut guest.wasi;
                preview1::path_link(wasi, &mut memory, fd, flags, ptr, len, to_fd, to_ptr, to_len)
                    .await
            })
        },
    )?;
    Ok(())
}

/// `path_symlink`: only the link itself is routed, its target is a text.
fn add_symlink(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_symlink",
        |mut caller: Caller<'_, Guest>,
         (ptr, len, fd, to_ptr, to_len): (i32, i32, i32, i32, i32)| {
            Box::new(async move {
                if len as u32 > PATH_BYTES_MAX {
                    return Ok(ERRNO_NAMETOOLONG);
                }
                let Some((fd, to_ptr, to_len)) = route(&mut caller, fd, to_ptr, to_len)? else {
                    return Ok(ERRNO_NAMETOOLONG);
                };
                if !reserve(&mut caller, fd, FILE_BYTES)? {
                    return Ok(ERRNO_NOSPC);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::path_symlink(&mut guest.wasi, &mut memory, ptr, len, fd, to_ptr, to_len)
                    .await
            })
        },
    )?;
    Ok(())
}
