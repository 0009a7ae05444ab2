//! The file format of snapshots: `snapshot/format.rs` without sessions (which `resume` has).
//!
//! An input is a byte and a file. If the byte is even, the file is read as it is; if it's odd, what
//! follows is a header of JSON after 16 bits of its length, and chunks, and gets the beginning, the end
//! and the checksums that make it a file.
//!
//! What has to hold of any file:
//! - it is refused as [`Error::Incompatible`], or all of it was read, within the limits that were given;
//! - no path, and no link, whichever others it passes, leads out of the scratch directory;
//! - what was read can be written, and reads the same.

use std::collections::BTreeMap;

use kaa::fuzzing::{Contents, read_snapshot};
use kaa::{Error, Limits};
use sha2::{Digest, Sha256};

use super::files::PAGE;
use super::input::Input;

const FILES_MAX: u64 = 64;
const MEMORY_BYTES_MAX: u64 = 64 << 20;
const DISK_BYTES_MAX: u64 = 1 << 20;
/// Links that are followed for one path.
const LINKS_MAX: usize = 40;

pub(crate) fn run(input: &[u8]) -> bool {
    let mut input = Input(input);
    let file = match input.u8() % 2 {
        0 => input.0.to_vec(),
        _ => sealed(input.string(), input.0),
    };
    let contents = match read(&file) {
        Ok(contents) => contents,
        Err(Error::Incompatible { .. }) => return false,
        Err(error) => panic!("a file led to {error:?}"),
    };
    check(&contents);
    let again = read(&contents.write().unwrap()).unwrap();
    assert_eq!(pages(&contents), pages(&again));
    assert_eq!(contents.header, again.header);
    assert!(contents.paths().eq(again.paths()));
    assert_eq!(contents.file_bytes(), again.file_bytes());
    true
}

fn read(file: &[u8]) -> kaa::Result<Contents> {
    let limits =
        Limits { memory_bytes: MEMORY_BYTES_MAX, disk_bytes: DISK_BYTES_MAX, ..Limits::default() };
    read_snapshot(file, &limits, FILES_MAX)
}

/// A file with this header and these chunks.
fn sealed(header: &[u8], chunks: &[u8]) -> Vec<u8> {
    let mut file = b"KAASNAP\0\x01\0\0\0".to_vec();
    file.extend((header.len() as u32).to_le_bytes());
    file.extend(header);
    file.extend(Sha256::digest(&file));
    file.extend(chunks);
    file.extend([0; 16]);
    file.extend(Sha256::digest(&file));
    file
}

/// Every page by its number: those that follow each other may come in one row or in several.
fn pages(contents: &Contents) -> BTreeMap<u32, &[u8]> {
    let rows = contents.pages.iter();
    rows.flat_map(|(first, bytes)| (*first..).zip(bytes.chunks(PAGE))).collect()
}

fn check(contents: &Contents) {
    let header = &contents.header;
    assert!(header.memory_bytes <= MEMORY_BYTES_MAX);
    let pages = pages(contents);
    assert_eq!(pages.len() as u64, header.pages);
    let last = pages.last_key_value().map_or(0, |(number, _)| u64::from(*number) + 1);
    assert!(last * PAGE as u64 <= header.memory_bytes);
    assert!(contents.file_bytes() <= DISK_BYTES_MAX);
    let paths: BTreeMap<&str, Option<&str>> = contents.paths().collect();
    assert_eq!(paths.len() as u64, header.files);
    assert!(header.files <= FILES_MAX);
    for path in paths.keys() {
        check_stays_inside(path, &paths);
    }
}

/// Follows a path as a system does.
fn check_stays_inside(path: &str, paths: &BTreeMap<&str, Option<&str>>) {
    let mut ahead: Vec<&str> = path.split('/').rev().collect();
    let (mut at, mut links) = (Vec::new(), 0);
    while let Some(name) = ahead.pop() {
        match name {
            "" => panic!("{path:?} is absolute, or has an empty name in it"),
            "." => continue,
            ".." => assert!(at.pop().is_some(), "{path:?} leads out of the scratch directory"),
            name => at.push(name),
        }
        if let Some(Some(target)) = paths.get(at.join("/").as_str()) {
            links += 1;
            if links > LINKS_MAX {
                return;
            }
            at.pop();
            ahead.extend(target.split('/').rev());
        }
    }
}
