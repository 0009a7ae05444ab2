//! The rules of the format that writing and reading check alike.

use std::collections::HashMap;

use super::{PAGE, SnapshotHeader};

const PATH_BYTES_MAX: usize = 1024;
const NAME_BYTES_MAX: usize = 255;
/// Removing a deep tree costs the host stack.
const DEPTH_MAX: usize = 64;
/// A path with a target or a length.
pub(super) const ENTRY_BYTES_MAX: usize = 2 * PATH_BYTES_MAX;

/// Which rule is broken: what it asks for, and what is there instead.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) expected: String,
    pub(super) found: String,
}

impl Fault {
    pub(super) fn new(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { expected: expected.into(), found: found.into() }
    }
}

/// What an entry says about a path.
#[derive(Debug, Clone, Copy)]
pub(super) enum Entry<'a> {
    Directory,
    File { bytes: u64 },
    Link { target: &'a str },
}

/// What was there so far, compared with the rules and the header's counts.
#[derive(Debug)]
pub(super) struct Contents {
    memory_pages: u64,
    header_pages: u64,
    header_files: u64,
    header_file_bytes: u64,
    /// The first page that may come next.
    next_page: u64,
    pages: u64,
    file_bytes: u64,
    /// The paths so far, and whether each is a directory.
    paths: HashMap<String, bool>,
}

impl Contents {
    pub(super) fn new(header: &SnapshotHeader) -> Result<Self, Fault> {
        let memory_pages = header.memory_bytes / PAGE as u64;
        if !header.memory_bytes.is_multiple_of(PAGE as u64) {
            return Err(Fault::new(
                format!("memory in whole pages of {PAGE} bytes"),
                format!("{} bytes", header.memory_bytes),
            ));
        }
        if header.pages > memory_pages {
            return Err(Fault::new(
                format!("at most the {memory_pages} pages of the memory"),
                format!("a header that counts {}", header.pages),
            ));
        }
        Ok(Self {
            memory_pages,
            header_pages: header.pages,
            header_files: header.files,
            header_file_bytes: header.file_bytes,
            next_page: 0,
            pages: 0,
            file_bytes: 0,
            paths: HashMap::new(),
        })
    }

    /// The next pages.
    pub(super) fn pages(&mut self, first: u32, count: u64) -> Result<(), Fault> {
        let first = u64::from(first);
        if !self.paths.is_empty() {
            return Err(Fault::new("all pages before the first file", format!("page {first}")));
        }
        if first < self.next_page {
            return Err(Fault::new(
                format!("pages that ascend, from {} on", self.next_page),
                format!("page {first}"),
            ));
        }
        let end = first.saturating_add(count);
        if end > self.memory_pages {
            return Err(Fault::new(
                format!("pages within a memory of {}", self.memory_pages),
                format!("{count} pages from {first} on"),
            ));
        }
        self.next_page = end;
        self.pages += count;
        at_most(self.header_pages, self.pages, "pages")
    }

    /// The next file. Its bytes have to follow.
    pub(super) fn entry(&mut self, path: &str, entry: Entry<'_>) -> Result<(), Fault> {
        at_most(self.header_files, self.paths.len() as u64 + 1, "files")?;
        check_path(path)?;
        if let Entry::Link { target } = entry {
            check_target(path, target)?;
        }
        if let Entry::File { bytes } = entry {
            self.file_bytes = self.file_bytes.saturating_add(bytes);
            at_most(self.header_file_bytes, self.file_bytes, "bytes of files")?;
        }
        if let Some((parent, _)) = path.rsplit_once('/')
            && self.paths.get(parent) != Some(&true)
        {
            return Err(Fault::new(
                "a directory before all that lies in it",
                format!("{path:?} without one"),
            ));
        }
        let directory = matches!(entry, Entry::Directory);
        match self.paths.insert(path.to_owned(), directory) {
            None => Ok(()),
            Some(_) => Err(Fault::new("each path once", format!("{path:?} twice"))),
        }
    }

    /// The end.
    pub(super) fn finish(&self) -> Result<(), Fault> {
        for (header, found, of) in [
            (self.header_pages, self.pages, "pages"),
            (self.header_files, self.paths.len() as u64, "files"),
            (self.header_file_bytes, self.file_bytes, "bytes of files"),
        ] {
            if header != found {
                return Err(Fault::new(
                    format!("{header} {of}, as the header counts"),
                    format!("{found}"),
                ));
            }
        }
        Ok(())
    }
}

fn at_most(header: u64, found: u64, of: &str) -> Result<(), Fault> {
    if found <= header {
        return Ok(());
    }
    Err(Fault::new(format!("{header} {of}, as the header counts"), "more"))
}

fn check_path(path: &str) -> Result<(), Fault> {
    check_length("path", path)?;
    let mut depth = 0;
    for name in path.split('/') {
        if matches!(name, "." | "..") {
            return Err(bad("path", path, "goes through `.` or `..`"));
        }
        check_name("path", path, name)?;
        depth += 1;
    }
    if depth > DEPTH_MAX {
        return Err(bad("path", path, format!("is more than {DEPTH_MAX} names deep")));
    }
    Ok(())
}

/// All `..` come first, where what is above is directories for certain and not links, so that
/// counting them tells where they lead.
fn check_target(path: &str, target: &str) -> Result<(), Fault> {
    check_length("target of a link", target)?;
    let mut above = path.split('/').count() - 1;
    let mut descends = false;
    for name in target.split('/') {
        match name {
            "." => {}
            ".." if descends => {
                return Err(bad("target of a link", target, "descends before `..`"));
            }
            ".." if above == 0 => {
                return Err(bad("target of a link", target, "leaves the scratch directory"));
            }
            ".." => above -= 1,
            name => {
                check_name("target of a link", target, name)?;
                descends = true;
            }
        }
    }
    Ok(())
}

fn check_length(what: &str, text: &str) -> Result<(), Fault> {
    if (1..=PATH_BYTES_MAX).contains(&text.len()) {
        return Ok(());
    }
    let expected = format!("a {what} of 1 to {PATH_BYTES_MAX} bytes");
    Err(Fault::new(expected, format!("{} bytes", text.len())))
}

fn check_name(what: &str, text: &str, name: &str) -> Result<(), Fault> {
    if name.is_empty() {
        return Err(bad(what, text, "is absolute or has an empty name in it"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(bad(what, text, format!("has a name of more than {NAME_BYTES_MAX} bytes")));
    }
    if name.contains('\0') {
        return Err(bad(what, text, "has a NUL in it"));
    }
    Ok(())
}

fn bad(what: &str, text: &str, why: impl AsRef<str>) -> Fault {
    let expected = format!("a {what} that stays within the scratch directory");
    Fault::new(expected, format!("{text:?}, which {}", why.as_ref()))
}
