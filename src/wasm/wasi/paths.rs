//! Functions that take a path: each is bounded, goes on in the mount that it leads to, and is charged
//! for what it makes.

use wasmtime::{Caller, Linker, Result};
use wasmtime_wasi::p1::wasi_snapshot_preview1 as preview1;

use super::{ERRNO_NOSPC, ERRNO_SUCCESS, MODULE, parts};
use crate::wasm::files::{DIRECTORY_BYTES, FILE_BYTES};
use crate::wasm::guest::{Guest, guest_slice, read_u32};

const ERRNO_MFILE: i32 = 33;
const ERRNO_XDEV: i32 = 75;
/// What is remembered of the name of an open file, for messages.
const OPEN_NAME_BYTES: usize = 256;
/// `oflags.creat` of `path_open`.
const OFLAGS_CREAT: i32 = 1;

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
    add_path_queries(linker)?;
    add_pairs_of_paths(linker)
}

/// Where a path that the guest names goes on: see `Files::route`.
fn route(caller: &mut Caller<'_, Guest>, fd: i32, ptr: i32, len: i32) -> Result<(i32, i32, i32)> {
    let memory = caller.data().handles()?.memory;
    let (bytes, guest) = memory.data_and_store_mut(caller);
    let (ptr, len) = (ptr as u32, len as u32);
    // What isn't in memory is left to wasmtime-wasi to refuse.
    let (fd, ptr, len) = match guest_slice(bytes, ptr, len) {
        Some(path) => guest.files.route(fd as u32, path, ptr),
        None => (fd as u32, ptr, len),
    };
    Ok((fd as i32, ptr as i32, len as i32))
}

/// Functions of one path that change something: routed, and charged when they make something.
fn add_path_changes(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_create_directory",
        |mut caller: Caller<'_, Guest>, (fd, ptr, len): (i32, i32, i32)| {
            Box::new(async move {
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
                if !caller.data_mut().files.reserve(fd as u32, DIRECTORY_BYTES) {
                    return Ok(ERRNO_NOSPC);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::path_create_directory(&mut guest.wasi, &mut memory, fd, ptr, len).await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "path_filestat_set_times",
        |mut caller: Caller<'_, Guest>,
         (fd, flags, ptr, len, atim, mtim, fst): (i32, i32, i32, i32, i64, i64, i32)| {
            Box::new(async move {
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
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
    linker.func_wrap_async(
        MODULE,
        "path_remove_directory",
        |mut caller: Caller<'_, Guest>, (fd, ptr, len): (i32, i32, i32)| {
            Box::new(async move {
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
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
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
                caller.data_mut().files.removed();
                let (mut memory, guest) = parts(&mut caller)?;
                preview1::path_unlink_file(&mut guest.wasi, &mut memory, fd, ptr, len).await
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
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
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
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
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
    let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
    if !caller.data().files.may_open() {
        return Ok(ERRNO_MFILE);
    }
    if oflags & OFLAGS_CREAT != 0 && !caller.data_mut().files.reserve(fd as u32, FILE_BYTES) {
        return Ok(ERRNO_NOSPC);
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

/// Functions of two paths.
fn add_pairs_of_paths(linker: &mut Linker<Guest>) -> Result<()> {
    linker.func_wrap_async(
        MODULE,
        "path_rename",
        |mut caller: Caller<'_, Guest>,
         (fd, ptr, len, to_fd, to_ptr, to_len): (i32, i32, i32, i32, i32, i32)| {
            Box::new(async move {
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
                let (to_fd, to_ptr, to_len) = route(&mut caller, to_fd, to_ptr, to_len)?;
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
                let (fd, ptr, len) = route(&mut caller, fd, ptr, len)?;
                let (to_fd, to_ptr, to_len) = route(&mut caller, to_fd, to_ptr, to_len)?;
                if caller.data().files.are_apart(fd as u32, to_fd as u32) {
                    return Ok(ERRNO_XDEV);
                }
                if !caller.data_mut().files.reserve(to_fd as u32, FILE_BYTES) {
                    return Ok(ERRNO_NOSPC);
                }
                let (mut memory, guest) = parts(&mut caller)?;
                let wasi = &mut guest.wasi;
                preview1::path_link(wasi, &mut memory, fd, flags, ptr, len, to_fd, to_ptr, to_len)
                    .await
            })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "path_symlink",
        |mut caller: Caller<'_, Guest>,
         (ptr, len, fd, to_ptr, to_len): (i32, i32, i32, i32, i32)| {
            Box::new(async move {
                let (fd, to_ptr, to_len) = route(&mut caller, fd, to_ptr, to_len)?;
                if !caller.data_mut().files.reserve(fd as u32, FILE_BYTES) {
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
