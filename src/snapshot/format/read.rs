//! Reading a snapshot that anyone may have written.

use std::io::{self, BufReader, Read};

use lz4_flex::block::decompress_into;
use sha2::{Digest, Sha256};

use super::check::{Contents, Entry, Fault};
use super::chunk::{CHUNK_BYTES_MAX, CHUNK_HEADER_BYTES, Chunk, Encoding, Kind};
use super::{
    Bounds, DIGEST_BYTES, FORMAT, HEADER_BYTES_MAX, MAGIC, PAGE, SavedFile, Sink, SnapshotHeader,
    incompatible,
};
use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 64 << 10;
/// What is told of a message that may quote the file.
const QUOTE_CHARS_MAX: usize = 200;

/// Reads the header, which has a checksum of its own, and nothing after it.
///
/// # Errors
///
/// [`Error::Incompatible`] with what is wrong with the file; [`Error::Io`].
pub(crate) fn read_header(input: &mut impl Read) -> Result<SnapshotHeader> {
    Source::new(input).header()
}

/// Reads a snapshot into the sink, once its header is within the bounds and accepted.
///
/// # Errors
///
/// [`Error::Incompatible`] with what is wrong with the file; [`Error::Io`]; what `accept` and the
/// sink return. The sink's contents are then to be thrown away.
pub(crate) fn read(
    input: impl Read,
    bounds: &Bounds,
    accept: impl FnOnce(&SnapshotHeader) -> Result<()>,
    sink: &mut dyn Sink,
) -> Result<SnapshotHeader> {
    let mut source = Source::new(BufReader::with_capacity(BUFFER_BYTES, input));
    let header = source.header()?;
    bounds.check(&header)?;
    accept(&header)?;
    let mut contents = Contents::new(&header).map_err(damaged)?;
    source.chunks(&mut contents, sink)?;
    contents.finish().map_err(damaged)?;
    source.digest()?;
    source.end()?;
    Ok(header)
}

/// The file, with the digest of what was read of it.
struct Source<R> {
    input: R,
    digest: Sha256,
    offset: u64,
    /// What a chunk stores, when that has to be decoded.
    stored: Vec<u8>,
}

impl<R: Read> Source<R> {
    fn new(input: R) -> Self {
        Self { input, digest: Sha256::new(), offset: 0, stored: Vec::new() }
    }

    fn header(&mut self) -> Result<SnapshotHeader> {
        let mut magic = [0; MAGIC.len()];
        let got = self.read_some(&mut magic)?;
        if !MAGIC.starts_with(&magic[..got]) {
            return Err(incompatible(
                "a file that Kaa saved a session in",
                "a file of another kind; check the path",
            ));
        }
        if got < MAGIC.len() {
            return Err(self.truncated());
        }
        self.version()?;
        let length = self.word()? as usize;
        if !(1..=HEADER_BYTES_MAX).contains(&length) {
            let expected = format!("a header of 1 to {HEADER_BYTES_MAX} bytes");
            return Err(damaged(Fault::new(expected, format!("{length} bytes"))));
        }
        let mut json = vec![0; length];
        self.read(&mut json)?;
        self.digest()?;
        let header: SnapshotHeader = serde_json::from_slice(&json).map_err(|e| {
            let why: String = e.to_string().chars().take(QUOTE_CHARS_MAX).collect();
            damaged(Fault::new("a header of this format", why))
        })?;
        Contents::new(&header).map_err(damaged)?;
        Ok(header)
    }

    fn version(&mut self) -> Result<()> {
        match self.word()? {
            FORMAT => Ok(()),
            0 => Err(damaged(Fault::new(format!("format {FORMAT}"), "format 0"))),
            newer => Err(incompatible(
                format!("format {FORMAT}"),
                format!(
                    "one written by a newer Kaa (format {newer}); this one reads up to {FORMAT}: \
                     update it, or save the session again with this version"
                ),
            )),
        }
    }

    fn chunks(&mut self, contents: &mut Contents, sink: &mut dyn Sink) -> Result<()> {
        let mut pages = Vec::new();
        loop {
            let chunk = self.chunk()?;
            match chunk.kind {
                Kind::End => return Ok(()),
                Kind::Pages => {
                    let length = chunk.length as usize;
                    contents.pages(chunk.at, (length / PAGE) as u64).map_err(damaged)?;
                    pages.resize(length, 0);
                    self.decode(chunk, &mut pages)?;
                    sink.pages(chunk.at, &pages)?;
                }
                Kind::Directory | Kind::File | Kind::Link => {
                    let file = self.file(chunk, contents)?;
                    sink.file(file)?;
                }
                Kind::Data => {
                    let expected = "data only after its file, and no more than its length";
                    return Err(damaged(Fault::new(expected, "more data")));
                }
            }
        }
    }

    fn chunk(&mut self) -> Result<Chunk> {
        let mut bytes = [0; CHUNK_HEADER_BYTES];
        self.read(&mut bytes)?;
        Chunk::decode(bytes).map_err(damaged)
    }

    /// Decodes what the chunk holds into exactly as many bytes.
    fn decode(&mut self, chunk: Chunk, out: &mut [u8]) -> Result<()> {
        match chunk.encoding {
            Encoding::Zeros => out.fill(0),
            Encoding::Raw => self.read(out)?,
            Encoding::Lz4 => {
                let mut stored = std::mem::take(&mut self.stored);
                stored.resize(chunk.stored as usize, 0);
                self.read(&mut stored)?;
                let decoded = decompress_into(&stored, out);
                self.stored = stored;
                if !decoded.is_ok_and(|length| length == out.len()) {
                    let expected = format!("an LZ4 block of {} bytes, decoded", out.len());
                    return Err(damaged(Fault::new(expected, "another")));
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, chunk: Chunk, contents: &mut Contents) -> Result<SavedFile> {
        let mut path = vec![0; chunk.at as usize];
        let mut rest = vec![0; (chunk.length - chunk.at) as usize];
        self.read(&mut path)?;
        self.read(&mut rest)?;
        let path = text(path)?;
        match chunk.kind {
            Kind::Link => {
                let target = text(rest)?;
                contents.entry(&path, Entry::Link { target: &target }).map_err(damaged)?;
                Ok(SavedFile::Link { path, target })
            }
            Kind::File => {
                let Ok(length) = rest.try_into().map(u64::from_le_bytes) else {
                    return Err(damaged(Fault::new("a file's length in 8 bytes", "another")));
                };
                contents.entry(&path, Entry::File { bytes: length }).map_err(damaged)?;
                Ok(SavedFile::File { path, bytes: self.data(length)? })
            }
            _ if !rest.is_empty() => {
                Err(damaged(Fault::new("a directory's path alone", "bytes after it")))
            }
            _ => {
                contents.entry(&path, Entry::Directory).map_err(damaged)?;
                Ok(SavedFile::Directory { path })
            }
        }
    }

    /// The bytes of a file whose length is within the bounds.
    fn data(&mut self, length: u64) -> Result<Vec<u8>> {
        let no_memory = || Error::io("reading the snapshot", io::ErrorKind::OutOfMemory.into());
        let length = usize::try_from(length).map_err(|_| no_memory())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length).map_err(|_| no_memory())?;
        while bytes.len() < length {
            let start = bytes.len();
            let part = (length - start).min(CHUNK_BYTES_MAX);
            let chunk = self.chunk()?;
            if chunk.kind != Kind::Data || chunk.length as usize != part {
                let found = format!("{:?} of {}", chunk.kind, chunk.length);
                return Err(damaged(Fault::new(format!("{part} bytes of a file"), found)));
            }
            bytes.resize(start + part, 0);
            self.decode(chunk, &mut bytes[start..])?;
        }
        Ok(bytes)
    }

    /// The digest of everything before it.
    fn digest(&mut self) -> Result<()> {
        let expected = self.digest.clone().finalize();
        let mut found = [0; DIGEST_BYTES];
        self.read(&mut found)?;
        if found == *expected {
            return Ok(());
        }
        Err(damaged(Fault::new("bytes that have the checksum saved with them", "altered ones")))
    }

    fn end(&mut self) -> Result<()> {
        match self.read_some(&mut [0])? {
            0 => Ok(()),
            _ => {
                let expected = format!("an end after {} bytes", self.offset - 1);
                Err(damaged(Fault::new(expected, "more")))
            }
        }
    }

    fn word(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read(&mut self, out: &mut [u8]) -> Result<()> {
        if self.read_some(out)? < out.len() { Err(self.truncated()) } else { Ok(()) }
    }

    /// Fewer than asked for are the last.
    fn read_some(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut got = 0;
        while got < out.len() {
            match self.input.read(&mut out[got..]) {
                Ok(0) => break,
                Ok(count) => got += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("reading the snapshot", error)),
            }
        }
        self.digest.update(&out[..got]);
        self.offset += got as u64;
        Ok(got)
    }

    fn truncated(&self) -> Error {
        let found = format!("one that ends after {} bytes", self.offset);
        damaged(Fault::new("a whole file", found))
    }
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes)
        .map_err(|_| damaged(Fault::new("a path in UTF-8", "bytes that aren't")))
}

fn damaged(fault: Fault) -> Error {
    let advice = "the file is damaged: take another copy of it, or save the session again";
    incompatible(fault.expected, format!("{}; {advice}", fault.found))
}
