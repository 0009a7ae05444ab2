//! Snapshot files, taken apart and put together.

#![allow(dead_code, reason = "every user of this needs a part of it")]

use std::collections::BTreeMap;
use std::path::Path;

use lz4_flex::block::decompress;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

pub(crate) const PAGE: usize = 4096;

/// A snapshot file, taken apart.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) header: Json,
    pub(crate) pages: BTreeMap<u32, Vec<u8>>,
    /// Kind, path, and what follows it: the contents of a file, the target of a link.
    pub(crate) files: Vec<(u8, String, Vec<u8>)>,
}

impl Parts {
    /// Of a file; its files are left out.
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let length = word(12) as usize;
        let header = serde_json::from_slice(&bytes[16..16 + length]).unwrap();
        let (mut at, mut pages) = (48 + length, BTreeMap::new());
        while bytes[at] == 1 {
            let (first, decoded, stored) = (word(at + 4), word(at + 8) as usize, word(at + 12));
            let stored = &bytes[at + 16..at + 16 + stored as usize];
            let content = match bytes[at + 1] {
                0 => vec![0; decoded],
                1 => stored.to_vec(),
                _ => decompress(stored, decoded).unwrap(),
            };
            pages.extend((first..).zip(content.chunks(PAGE).map(<[u8]>::to_vec)));
            at += 16 + stored.len();
        }
        Self { header, pages, files: Vec::new() }
    }

    /// With the counts and checksums that make it a good one.
    pub(crate) fn write(&self, path: &Path) {
        let mut header = self.header.clone();
        header["pages"] = self.pages.len().into();
        header["files"] = self.files.len().into();
        let of_file = |file: &&(u8, String, Vec<u8>)| file.0 == 3;
        let file_bytes: usize = self.files.iter().filter(of_file).map(|file| file.2.len()).sum();
        header["file_bytes"] = file_bytes.into();
        let json = serde_json::to_vec(&header).unwrap();
        let mut bytes = b"KAASNAP\0\x01\0\0\0".to_vec();
        bytes.extend((json.len() as u32).to_le_bytes());
        bytes.extend(json);
        let seal = |bytes: &mut Vec<u8>| bytes.extend(Sha256::digest(&bytes[..]));
        seal(&mut bytes);
        let chunk = |bytes: &mut Vec<u8>, kind: u8, at: u32, content: &[u8]| {
            bytes.extend([kind, 1, 0, 0]);
            bytes.extend(at.to_le_bytes());
            bytes.extend((content.len() as u32).to_le_bytes());
            bytes.extend((content.len() as u32).to_le_bytes());
            bytes.extend(content);
        };
        for (number, page) in &self.pages {
            chunk(&mut bytes, 1, *number, page);
        }
        for (kind, path, rest) in &self.files {
            let mut content = path.clone().into_bytes();
            match kind {
                3 => content.extend((rest.len() as u64).to_le_bytes()),
                _ => content.extend(rest),
            }
            chunk(&mut bytes, *kind, path.len() as u32, &content);
            if *kind == 3 && !rest.is_empty() {
                chunk(&mut bytes, 5, 0, rest);
            }
        }
        bytes.extend([0; 16]);
        seal(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }

    pub(crate) fn global(&mut self, number: usize, bits: u64) {
        let globals = self.header["globals"].as_array_mut().unwrap();
        let number = number % globals.len();
        globals[number]["bits"] = bits.into();
    }

    pub(crate) fn memory_pages(&self) -> u32 {
        (self.header["memory_bytes"].as_u64().unwrap() / PAGE as u64) as u32
    }
}
