//! The 16 bytes that begin each chunk.

use super::PAGE;
use super::check::{ENTRY_BYTES_MAX, Fault};

pub(super) const CHUNK_HEADER_BYTES: usize = 16;
/// The most that a chunk holds, and so what a reader needs for one.
pub(super) const CHUNK_BYTES_MAX: usize = 256 * PAGE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    End = 0,
    Pages = 1,
    Directory = 2,
    File = 3,
    Link = 4,
    Data = 5,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Zeros = 0,
    Raw = 1,
    Lz4 = 2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) kind: Kind,
    pub(super) encoding: Encoding,
    pub(super) at: u32,
    /// Bytes that it holds.
    pub(super) length: u32,
    /// Bytes that are stored.
    pub(super) stored: u32,
}

impl Chunk {
    pub(super) const END: Self =
        Self { kind: Kind::End, encoding: Encoding::Zeros, at: 0, length: 0, stored: 0 };

    pub(super) fn encode(self) -> [u8; CHUNK_HEADER_BYTES] {
        let mut bytes = [0; CHUNK_HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = self.encoding as u8;
        bytes[4..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..].copy_from_slice(&self.stored.to_le_bytes());
        bytes
    }

    /// Decodes and checks all that can be known from these bytes alone.
    pub(super) fn decode(bytes: [u8; CHUNK_HEADER_BYTES]) -> Result<Self, Fault> {
        let [kind, encoding, zero @ ..] = bytes;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let kind = match kind {
            0 => Kind::End,
            1 => Kind::Pages,
            2 => Kind::Directory,
            3 => Kind::File,
            4 => Kind::Link,
            5 => Kind::Data,
            _ => return Err(Fault::new("a chunk of kind 0 to 5", format!("kind {kind}"))),
        };
        let encoding = match encoding {
            0 => Encoding::Zeros,
            1 => Encoding::Raw,
            2 => Encoding::Lz4,
            _ => return Err(Fault::new("an encoding from 0 to 2", format!("encoding {encoding}"))),
        };
        let chunk = Self { kind, encoding, at: word(4), length: word(8), stored: word(12) };
        if zero[..2] == [0; 2] && chunk.is_coherent() {
            Ok(chunk)
        } else {
            Err(Fault::new("a chunk as the format describes it", format!("{chunk:?}")))
        }
    }

    fn is_coherent(self) -> bool {
        let (at, length) = (self.at as usize, self.length as usize);
        let stored_fits = match self.encoding {
            Encoding::Zeros => self.stored == 0,
            Encoding::Raw => self.stored == self.length,
            Encoding::Lz4 => self.stored > 0 && self.stored < self.length,
        };
        let holds = match self.kind {
            Kind::End => self.encoding == Encoding::Zeros && at == 0 && length == 0,
            Kind::Pages => length > 0 && length.is_multiple_of(PAGE) && length <= CHUNK_BYTES_MAX,
            Kind::Data => at == 0 && length > 0 && length <= CHUNK_BYTES_MAX,
            Kind::Directory | Kind::File | Kind::Link => {
                self.encoding == Encoding::Raw && at <= length && length <= ENTRY_BYTES_MAX
            }
        };
        stored_fits && holds
    }
}
