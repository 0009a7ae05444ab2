//! Writing a snapshot.

use std::io::{self, Write};

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use sha2::{Digest, Sha256};

use super::check::{Contents, Entry, Fault};
use super::chunk::{CHUNK_BYTES_MAX, CHUNK_HEADER_BYTES, Chunk, Encoding, Kind};
use super::{FORMAT, HEADER_BYTES_MAX, MAGIC, PAGE, SavedFile, SnapshotHeader};
use crate::error::{Error, Result};

/// Writes a snapshot as it comes: pages in ascending order, then files, then [`finish`].
/// It checks what a reader checks. After an error, what was written is to be removed.
///
/// [`finish`]: Writer::finish
pub(crate) struct Writer<W: Write> {
    out: W,
    digest: Sha256,
    contents: Contents,
    table: CompressTable,
    /// Room for a chunk, compressed.
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// # Errors
    ///
    /// [`Error::Invalid`] for a header that breaks a rule of the format; [`Error::Io`].
    pub(crate) fn new(out: W, header: &SnapshotHeader) -> Result<Self> {
        let contents = Contents::new(header).map_err(invalid)?;
        let json = serde_json::to_vec(header)
            .map_err(|e| Error::io("writing the snapshot's header", e.into()))?;
        if json.len() > HEADER_BYTES_MAX {
            return Err(Error::invalid(
                "the snapshot",
                format!(
                    "its header takes {} bytes, at most {HEADER_BYTES_MAX} are possible; give the \
                     session fewer environment variables, tools or allowed imports",
                    json.len()
                ),
            ));
        }
        let buffer = vec![0; CHUNK_HEADER_BYTES + get_maximum_output_size(CHUNK_BYTES_MAX)];
        let (digest, table) = (Sha256::new(), CompressTable::large());
        let mut writer = Self { out, digest, contents, table, buffer };
        writer.put(&MAGIC)?;
        writer.put(&FORMAT.to_le_bytes())?;
        writer.put(&(json.len() as u32).to_le_bytes())?;
        writer.put(&json)?;
        writer.put_digest()?;
        Ok(writer)
    }

    /// Pages that follow each other, as many as one likes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when they don't ascend, leave the memory, or are more than the header
    /// counts; [`Error::Io`].
    pub(crate) fn pages(&mut self, first_page: u32, bytes: &[u8]) -> Result<()> {
        if !bytes.len().is_multiple_of(PAGE) {
            let found = format!("{} bytes", bytes.len());
            return Err(invalid(Fault::new(format!("pages of {PAGE} bytes"), found)));
        }
        self.contents.pages(first_page, (bytes.len() / PAGE) as u64).map_err(invalid)?;
        let (mut at, mut rest) = (first_page, bytes);
        while !rest.is_empty() {
            let (run, after) = rest.split_at(run_length(rest));
            self.put_chunk(Kind::Pages, at, run)?;
            // Within the memory, whose pages a u32 numbers; after the very last it isn't used.
            at = at.wrapping_add((run.len() / PAGE) as u32);
            rest = after;
        }
        Ok(())
    }

    /// # Errors
    ///
    /// [`Error::Invalid`] for a path that the format can't hold, that came before, or whose
    /// directory didn't, and for more than the header counts; [`Error::Io`].
    pub(crate) fn file(&mut self, file: &SavedFile) -> Result<()> {
        let mut bytes: &[u8] = &[];
        match file {
            SavedFile::Directory { path } => {
                self.put_entry(Kind::Directory, path, Entry::Directory, &[])?;
            }
            SavedFile::Link { path, target } => {
                self.put_entry(Kind::Link, path, Entry::Link { target }, target.as_bytes())?;
            }
            SavedFile::File { path, bytes: data } => {
                bytes = data;
                let length = bytes.len() as u64;
                let entry = Entry::File { bytes: length };
                self.put_entry(Kind::File, path, entry, &length.to_le_bytes())?;
            }
        }
        bytes.chunks(CHUNK_BYTES_MAX).try_for_each(|part| self.put_chunk(Kind::Data, 0, part))
    }

    /// Ends the file and gives back what it was written to, flushed.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the header counts more than came; [`Error::Io`].
    pub(crate) fn finish(mut self) -> Result<W> {
        self.contents.finish().map_err(invalid)?;
        self.put(&Chunk::END.encode())?;
        self.put_digest()?;
        self.out.flush().map_err(writing)?;
        Ok(self.out)
    }

    fn put_entry(&mut self, kind: Kind, path: &str, entry: Entry<'_>, rest: &[u8]) -> Result<()> {
        self.contents.entry(path, entry).map_err(invalid)?;
        let length = (path.len() + rest.len()) as u32;
        let (at, encoding) = (path.len() as u32, Encoding::Raw);
        self.put(&Chunk { kind, encoding, at, length, stored: length }.encode())?;
        self.put(path.as_bytes())?;
        self.put(rest)
    }

    fn put_chunk(&mut self, kind: Kind, at: u32, bytes: &[u8]) -> Result<()> {
        let length = bytes.len() as u32;
        if is_zero(bytes) {
            let encoding = Encoding::Zeros;
            return self.put(&Chunk { kind, encoding, at, length, stored: 0 }.encode());
        }
        let room = &mut self.buffer[CHUNK_HEADER_BYTES..];
        match compress_into_with_table(bytes, room, &mut self.table) {
            Ok(size) if size < bytes.len() => {
                let (encoding, stored) = (Encoding::Lz4, size as u32);
                let header = Chunk { kind, encoding, at, length, stored }.encode();
                self.buffer[..CHUNK_HEADER_BYTES].copy_from_slice(&header);
                let whole = &self.buffer[..CHUNK_HEADER_BYTES + size];
                self.digest.update(whole);
                self.out.write_all(whole).map_err(writing)
            }
            _ => {
                let encoding = Encoding::Raw;
                self.put(&Chunk { kind, encoding, at, length, stored: length }.encode())?;
                self.put(bytes)
            }
        }
    }

    fn put_digest(&mut self) -> Result<()> {
        let digest = self.digest.clone().finalize();
        self.put(&digest)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        self.out.write_all(bytes).map_err(writing)
    }
}

/// How many of these pages, in bytes, make one chunk: all of them zero, or none.
fn run_length(bytes: &[u8]) -> usize {
    let mut pages = bytes[..bytes.len().min(CHUNK_BYTES_MAX)].chunks_exact(PAGE);
    let zero = pages.next().is_some_and(is_zero);
    PAGE + PAGE * pages.take_while(|page| is_zero(page) == zero).count()
}

fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    bytes.chunks(PAGE).all(|part| *part == ZEROS[..part.len()])
}

fn invalid(fault: Fault) -> Error {
    let reason = format!("it can't be saved: expected {}, found {}", fault.expected, fault.found);
    Error::invalid("the snapshot", reason)
}

fn writing(source: io::Error) -> Error {
    Error::io("writing the snapshot", source)
}
