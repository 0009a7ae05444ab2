//! The state of a guest's memory at one moment, as what differs from an image.
//!
//! A checkpoint, a snapshot and a fork are all such a state. States share what they have in common:
//! the image, runs of pages in files, and single pages; so a history of states costs what changed
//! between them, and a fork costs what its guest writes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use wasmtime::Val;

use super::memory::{MemoryImage, Run};
use crate::error::Result;

/// Bytes of a page of the host, the grain of a state. Larger pages are several of these.
pub(crate) const PAGE: usize = 4096;
/// A page's contents.
pub(crate) type Page = [u8; PAGE];

/// Pages in a row from which on a fork maps them from a file instead of copying them: a mapping
/// costs as much as copying some pages.
const RUN_PAGES_MIN: usize = 32;
/// Runs that one state may have: each is a mapping or two, of which a process may have some 65,000.
pub(crate) const RUNS_MAX: usize = 64;

static ZEROS: Page = [0; PAGE];

/// Memory and globals of a guest. Cheap to clone.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) image: Arc<MemoryImage>,
    /// Size of the memory.
    pub(crate) bytes: usize,
    pub(crate) globals: Vec<Val>,
    /// What lies over the image: ascending, apart.
    runs: Vec<Run>,
    /// What lies over image and runs, by page number.
    pages: BTreeMap<usize, Arc<Page>>,
}

impl State {
    /// The state of an image.
    pub(crate) fn of(image: Arc<MemoryImage>, globals: Vec<Val>) -> Self {
        let bytes = image.bytes();
        Self { image, bytes, globals, runs: Vec::new(), pages: BTreeMap::new() }
    }

    /// What lies over the image, but single pages.
    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The single pages, ascending.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (usize, &Page)> {
        self.pages.iter().map(|(number, page)| (*number, &**page))
    }

    /// Bytes of the single pages.
    pub(crate) fn page_bytes(&self) -> usize {
        self.pages.len() * PAGE
    }

    /// The single page of this number, if there is one.
    pub(crate) fn single(&self, number: usize) -> Option<&Page> {
        self.pages.get(&number).map(|page| &**page)
    }

    /// What is at a page, wherever it lies.
    pub(crate) fn page(&self, number: usize) -> &[u8] {
        match self.single(number) {
            Some(page) => page,
            None => self.below(number),
        }
    }

    /// What is at a page but for the single pages: what a mapping of image and runs shows there.
    pub(crate) fn below(&self, number: usize) -> &[u8] {
        let start = number * PAGE;
        let at = self.runs.partition_point(|run| run.range().end <= start);
        if let Some(run) = self.runs.get(at).filter(|run| run.range().start <= start) {
            return &run.contents()[start - run.range().start..][..PAGE];
        }
        self.image.contents().get(start..start + PAGE).unwrap_or(&ZEROS)
    }

    /// Takes over the pages of `range`, which must be whole pages of `memory`, and tells each that it
    /// has as it is.
    pub(crate) fn copy(
        &mut self,
        memory: &[u8],
        range: Range<usize>,
        mut unchanged: impl FnMut(usize),
    ) {
        for number in range.start / PAGE..range.end / PAGE {
            let now: &Page =
                memory[number * PAGE..][..PAGE].try_into().expect("a range of whole pages");
            match self.pages.get_mut(&number) {
                Some(saved) if **saved == *now => unchanged(number),
                Some(saved) => match Arc::get_mut(saved) {
                    Some(saved) => *saved = *now,
                    // A snapshot has it too.
                    None => *saved = Arc::new(*now),
                },
                None => {
                    self.pages.insert(number, Arc::new(*now));
                }
            }
        }
    }

    /// Sets single pages from the start of `bytes` on.
    pub(crate) fn set(&mut self, first: usize, bytes: &[u8]) {
        for (number, page) in (first..).zip(bytes.chunks_exact(PAGE)) {
            let page: &Page = page.try_into().expect("a chunk of a page");
            self.pages.insert(number, Arc::new(*page));
        }
    }

    /// Lays a run over everything that is there.
    pub(crate) fn lay(&mut self, run: Run) {
        let range = run.range();
        let mut runs: Vec<Run> = self.runs.iter().flat_map(|old| old.without(&range)).collect();
        let at = runs.partition_point(|old| old.range().start < range.start);
        runs.insert(at, run);
        self.runs = runs;
        let mut rest = self.pages.split_off(&(range.start / PAGE));
        self.pages.append(&mut rest.split_off(&(range.end / PAGE)));
    }

    /// The same state for many forks: long rows of single pages become runs, which are mapped and
    /// not copied.
    ///
    /// # Errors
    ///
    /// [`Error::Io`](crate::Error::Io) when there is no room for them.
    pub(crate) fn condensed(&self) -> Result<Self> {
        let room = RUNS_MAX.saturating_sub(self.runs.len());
        let mut rows: Vec<Range<usize>> = Vec::new();
        for number in self.pages.keys() {
            match rows.last_mut() {
                Some(row) if row.end == *number => row.end += 1,
                _ => rows.push(*number..number + 1),
            }
        }
        rows.retain(|row| row.len() >= RUN_PAGES_MIN);
        rows.sort_by_key(|row| std::cmp::Reverse(row.len()));
        // Laying a run over the middle of another makes two of it.
        rows.truncate(room / 2);
        let mut state = self.clone();
        if rows.is_empty() {
            return Ok(state);
        }
        let parts = |row: Range<usize>| {
            (row.start * PAGE, self.pages.range(row).map(|(_, page)| &page[..]).collect())
        };
        Run::write(rows.into_iter().map(parts))?.into_iter().for_each(|run| state.lay(run));
        Ok(state)
    }

    /// Every page that isn't as in `base`, ascending.
    pub(crate) fn differences<'state>(
        &'state self,
        base: &'state Self,
    ) -> impl Iterator<Item = (usize, &'state [u8])> {
        let candidates: Box<dyn Iterator<Item = usize> + Send> =
            if Arc::ptr_eq(&self.image, &base.image) {
                let foreign =
                    self.runs.iter().filter(|run| !base.runs.iter().any(|own| own.is(run)));
                let mut ranges: Vec<Range<usize>> = foreign.map(Run::range).collect();
                ranges.extend(self.pages.keys().map(|page| page * PAGE..(page + 1) * PAGE));
                ranges.sort_by_key(|range| range.start);
                let mut next = 0;
                Box::new(ranges.into_iter().flat_map(move |range| {
                    let pages = (range.start / PAGE).max(next)..range.end / PAGE;
                    next = next.max(pages.end);
                    pages
                }))
            } else {
                Box::new(0..self.bytes / PAGE)
            };
        let pages = candidates.map(|number| (number, self.page(number)));
        pages.filter(|(number, page)| base.page(*number) != *page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wasm::memory::WASM_PAGE;

    fn filled(pages: usize, byte: u8) -> Vec<u8> {
        vec![byte; pages * PAGE]
    }

    fn state() -> State {
        State::of(Arc::new(MemoryImage::of(&filled(WASM_PAGE / PAGE * 4, 1)).unwrap()), vec![])
    }

    fn run(start: usize, pages: usize, byte: u8) -> Run {
        let bytes = filled(pages, byte);
        Run::write([(start * PAGE, vec![&bytes[..]])]).unwrap().remove(0)
    }

    fn show(state: &State, pages: Range<usize>) -> Vec<u8> {
        pages.map(|number| state.page(number)[0]).collect()
    }

    #[test]
    fn what_is_laid_last_is_seen() {
        let mut state = state();
        state.set(3, &filled(1, 2));
        state.lay(run(2, 6, 3));
        state.set(4, &filled(1, 4));
        state.lay(run(5, 1, 5));
        assert_eq!(show(&state, 0..10), [1, 1, 3, 3, 4, 5, 3, 3, 1, 1]);
        let ranges: Vec<_> = state.runs().iter().map(Run::range).collect();
        assert_eq!(ranges, [2 * PAGE..5 * PAGE, 5 * PAGE..6 * PAGE, 6 * PAGE..8 * PAGE]);
        assert_eq!(show(&state, 1000..1001), [0], "beyond the image are zeros");
    }

    #[test]
    fn a_clone_does_not_see_later_changes() {
        let mut state = state();
        let mut memory = filled(64, 1);
        memory[5 * PAGE] = 7;
        state.copy(&memory, 5 * PAGE..6 * PAGE, |_| {});
        let before = state.clone();
        memory[5 * PAGE] = 8;
        state.copy(&memory, 5 * PAGE..6 * PAGE, |_| {});
        assert_eq!((before.page(5)[0], state.page(5)[0]), (7, 8));
    }

    #[test]
    fn condensing_changes_nothing_but_the_form() {
        let mut state = state();
        state.lay(run(0, 8, 3));
        state.set(2, &filled(40, 6));
        state.set(50, &filled(2, 7));
        let condensed = state.condensed().unwrap();
        assert_eq!(show(&condensed, 0..64), show(&state, 0..64));
        assert_eq!(condensed.page_bytes(), 2 * PAGE);
        assert_eq!(condensed.runs().len(), 2);
    }

    #[test]
    fn differences_are_those_in_content() {
        let mut state = state();
        state.lay(run(2, 3, 1));
        state.set(3, &filled(1, 9));
        state.set(8, &filled(1, 1));
        state.set(60, &filled(1, 2));
        let found = |base: &State| -> Vec<usize> {
            state.differences(base).map(|(number, _)| number).collect()
        };
        let base = State::of(Arc::clone(&state.image), vec![]);
        assert_eq!(found(&base), [3, 60]);
        let other = State::of(Arc::new(MemoryImage::of(&filled(64, 1)).unwrap()), vec![]);
        assert_eq!(found(&other), [3, 60], "also against another image");
    }
}
