//! What an image says about itself.

use serde::{Deserialize, Serialize};

/// An image's memory, in its directory.
pub(crate) const MEMORY: &str = "memory.bin";

/// A file of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// A mutable global of the module, as a session starts with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GlobalRecord {
    pub(crate) export: String,
    #[serde(rename = "type")]
    pub(crate) type_name: String,
    pub(crate) bits: u64,
}

/// Addresses of what the host uses of the agent: the code object of a turn, its globals, and the list
/// that it leaves texts in (see `wasm/text.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) code: u32,
    pub(crate) names: u32,
    pub(crate) mailbox: Option<u32>,
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageManifest {
    pub(crate) format: u32,
    /// The image's key: SHA-256 of all that it was made from.
    pub key: String,
    /// The name it was built under.
    pub name: String,
    /// The key of the compiled module that it runs on; images share it.
    pub module: String,
    /// The key of the image that it was built from.
    pub parent: Option<String>,
    /// Modules that are already imported.
    pub imports: Vec<String>,
    /// Python of the guest, such as `3.15.0`.
    pub python: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Whether it brings files of its own.
    pub site: bool,
    pub(crate) globals: Vec<GlobalRecord>,
    pub(crate) entry: Entry,
    /// Where in the memory a `.` stands: see `wasm/files.rs`.
    pub(crate) dot: u32,
    pub(crate) files: Vec<FileRecord>,
}

impl ImageManifest {
    /// SHA-256 of the memory that sessions start from.
    #[must_use]
    pub fn memory_sha256(&self) -> &str {
        let memory = self.files.iter().find(|file| file.path == MEMORY);
        memory.map_or("", |file| &file.sha256)
    }
}
