//! The states that a session goes through: saving the present one, going back, going to another's.

use std::ops::Range;
use std::sync::Arc;

use super::super::dirty::DirtyPages;
use super::super::memory::{MemoryImage, Run, WASM_PAGE};
use super::super::state::{PAGE, RUNS_MAX, State};
use super::super::wasi::close_since_checkpoint;
use super::{Session, set_globals};
use crate::error::{Error, Result};

/// Bytes of single pages that a checkpoint may have. Beyond them long rows become runs, from which
/// the session goes on: copies beside the session's own pages would double its memory, and comparing
/// them would take longer than its cells.
const CHECKPOINT_BYTES_MAX: usize = 16 << 20;
/// What was written in one row and is as long as this becomes a run at once.
pub(crate) const RUN_BYTES: usize = 8 << 20;
/// The same, for a session whose checkpoint is full.
const RUN_BYTES_WHEN_FULL: usize = 256 << 10;

/// Bytes of single pages from which on a session protects those that don't change. Below, comparing
/// them costs less than the faults of those that do.
const PROTECT_BYTES_MIN: usize = 1 << 20;
/// Pages in a row that are worth a call of the system.
const PROTECT_PAGES_MIN: usize = 8;

/// Ranges of a memory, in whole pages and ascending, that a checkpoint has to look at.
pub(crate) struct Written(Vec<Range<usize>>);

impl Written {
    /// How much that is.
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }
}

impl Session {
    /// What the guest has written since the last checkpoint, and more where the system doesn't tell
    /// so precisely.
    pub(crate) fn written(&self) -> Written {
        let pages = self.slot.private_pages(self.start.dirty_pages, self.watched);
        Written(pages.unwrap_or_else(|_| {
            let store = self.store.as_ref().expect("a session has a store between its methods");
            let handles = store.data().handles.as_ref().expect("an instance has handles");
            let checkpoint = &self.checkpoint;
            // Not with what is mapped: a page may have gone back to that since the checkpoint.
            differing(handles.memory.data(store), |number| checkpoint.page(number))
        }))
    }

    /// Saves the present state as the one to go back to: only what changed since the last time is
    /// copied.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no memory for it; the session is lost then.
    pub(crate) fn save(&mut self, written: Written) -> Result<()> {
        let store = self.store.as_mut().expect("a session has a store between its methods");
        store.data_mut().files.keep();
        let handles = store.data().handles.clone().expect("an instance has handles");
        self.checkpoint.globals =
            handles.globals.iter().map(|global| global.get(&mut *store)).collect();
        let memory = handles.memory.data_mut(&mut *store);
        self.checkpoint.bytes = memory.len();
        let Written(written) = written;
        let total: usize = written.iter().map(Range::len).sum();
        let row = if total > CHECKPOINT_BYTES_MAX { RUN_BYTES_WHEN_FULL } else { RUN_BYTES };
        let (mut rows, mut rest) = (Vec::new(), Vec::new());
        for range in written {
            if range.len() >= row { rows.push(range) } else { rest.push(range) }
        }
        let kept: usize = rest.iter().map(Range::len).sum();
        let full = kept.max(self.checkpoint.page_bytes()) > CHECKPOINT_BYTES_MAX;
        if full || rows.len() + self.laid.len() > RUNS_MAX / 2 {
            let image = Arc::new(MemoryImage::of(memory)?);
            let globals = std::mem::take(&mut self.checkpoint.globals);
            let state = State::of(image, globals);
            self.note_private(state.bytes);
            self.rebuild(&state)?;
            self.checkpoint = state;
            return Ok(());
        }
        for range in rows {
            for run in Run::write([(range.start, vec![&memory[range]])])? {
                self.slot.lay(memory, &run)?;
                self.checkpoint.lay(run);
            }
        }
        self.laid = self.checkpoint.runs().to_vec();
        let mut unchanged: Vec<Range<usize>> = Vec::new();
        for range in rest {
            self.checkpoint.copy(memory, range, |number| match unchanged.last_mut() {
                Some(row) if row.end == number => row.end += 1,
                _ => unchanged.push(number..number + 1),
            });
        }
        self.protect(&unchanged);
        self.note_own();
        Ok(())
    }

    /// Tells the tenant what only this session has beside its checkpoint's image.
    fn note_own(&self) {
        let own_runs: usize =
            self.laid.iter().filter(|run| self.is_own(run)).map(|run| run.range().len()).sum();
        // Each page is there twice: in the session's memory and in the checkpoint.
        self.note_private(2 * self.checkpoint.page_bytes() + own_runs);
    }

    /// Protects rows of pages that the last cells didn't change, so that the next checkpoint need not
    /// look at them; where there are enough of them to be worth it, and the system can.
    fn protect(&mut self, rows: &[Range<usize>]) {
        let worth = self.checkpoint.page_bytes() >= PROTECT_BYTES_MIN;
        if self.start.dirty_pages != DirtyPages::Protect || !worth {
            return;
        }
        if !self.watched {
            self.watched = self.slot.watch(0..self.checkpoint.bytes).is_ok();
        }
        for row in rows.iter().filter(|row| self.watched && row.len() >= PROTECT_PAGES_MIN) {
            // What can't be protected, such as a mapping that was made since, is looked at again.
            let _ = self.slot.protect(row.start * PAGE..row.end * PAGE);
        }
    }

    /// Tells the tenant what only this session has, in memory and for its checkpoint.
    fn note_private(&self, bytes: usize) {
        if let Some(seat) = self.guest().memory_limit.seat.upgrade() {
            seat.set_memory(bytes as u64);
        }
    }

    /// Whether nobody else has the run.
    pub(crate) fn is_own(&self, run: &Run) -> bool {
        let own = self.laid.iter().chain(self.checkpoint.runs());
        run.sharers() <= own.filter(|other| other.is_of_file(run)).count()
    }

    /// Goes back to the last checkpoint. Open files stay open.
    ///
    /// # Errors
    ///
    /// When the system refuses a mapping; the session is lost then.
    pub(crate) fn roll_back(&mut self) -> Result<()> {
        close_since_checkpoint(self.guest_mut());
        let checkpoint = self.checkpoint.clone();
        self.go_to(&checkpoint)
    }

    /// Goes to a state of this session or of another of its image, and takes it for its checkpoint.
    ///
    /// # Errors
    ///
    /// As [`roll_back`](Self::roll_back).
    pub(crate) fn restore(&mut self, state: &State) -> Result<()> {
        self.go_to(state)?;
        self.checkpoint = state.clone();
        self.note_own();
        Ok(())
    }

    /// Makes memory and globals those of `state`, in place where that is possible.
    pub(super) fn go_to(&mut self, state: &State) -> Result<()> {
        let same = Arc::ptr_eq(self.slot.image(), &state.image) && self.start.reusable;
        if !same || self.memory_bytes() > state.bytes {
            return self.rebuild(state);
        }
        self.bring(state)?;
        self.guest_mut().running = false;
        Ok(())
    }

    /// Makes memory and globals those of `state`, whose image is mapped. A memory that is larger
    /// keeps its size, and what is beyond.
    pub(super) fn bring(&mut self, state: &State) -> Result<()> {
        let store = self.store.as_mut().expect("a session has a store between its methods");
        let handles = store.data().handles.clone().expect("an instance has handles");
        let bytes = handles.memory.data_size(&*store);
        if bytes < state.bytes {
            let pages = (state.bytes - bytes).div_ceil(WASM_PAGE);
            // What the tenant is charged with is what isn't shared: see `save`.
            let seat = std::mem::take(&mut store.data_mut().memory_limit.seat);
            let grown = handles.memory.grow(&mut *store, pages as u64);
            store.data_mut().memory_limit.seat = seat;
            grown.map_err(|e| Error::invalid("limits.memory_bytes", format!("{e:#}")))?;
        }
        let memory = handles.memory.data_mut(&mut *store);
        let changed = |run: &Run, others: &[Run]| !others.iter().any(|other| other.is(run));
        for run in self.laid.iter().filter(|run| changed(run, state.runs())) {
            self.slot.uncover(memory, run.range())?;
        }
        for run in state.runs().iter().filter(|run| changed(run, &self.laid)) {
            self.slot.lay(memory, run)?;
        }
        self.laid = state.runs().to_vec();
        let written = match self.slot.private_pages(self.start.dirty_pages, false) {
            Ok(written) => written,
            Err(_) => differing(memory, |number| state.below(number)),
        };
        for number in written.into_iter().flat_map(|range| range.start / PAGE..range.end / PAGE) {
            if number * PAGE < state.bytes && state.single(number).is_none() {
                set_page(memory, number, state.below(number));
            }
        }
        for (number, page) in state.pages() {
            set_page(memory, number, page);
        }
        set_globals(store, &handles, &state.globals)
    }

    /// Makes the memory beyond the image zeros, whatever was there.
    pub(super) fn clear(&mut self, range: Range<usize>) -> Result<()> {
        let store = self.store.as_mut().expect("a session has a store between its methods");
        let memory = store.data().handles.as_ref().expect("an instance has handles").memory;
        self.slot.uncover(memory.data_mut(store), range)
    }

    /// A new instance in `state`.
    fn rebuild(&mut self, state: &State) -> Result<()> {
        let store = self.store.take();
        let mut guest = store.expect("a session has a store between its methods").into_data();
        guest.handles = None;
        guest.memory_limit.begin_instance();
        let slot = Arc::get_mut(&mut self.slot)
            .ok_or_else(|| Error::Internal("an instance outlived its store".into()))?;
        slot.rewind(&state.image, state.bytes)?;
        self.laid.clear();
        self.watched = false;
        self.instantiate(guest)?;
        self.bring(state)
    }
}

/// Writes a page if it's another: one that is protected costs a fault, and reading it doesn't.
fn set_page(memory: &mut [u8], number: usize, page: &[u8]) {
    let target = &mut memory[number * PAGE..][..PAGE];
    if target != page {
        target.copy_from_slice(page);
    }
}

/// The pages of `memory` that aren't as `expected`, in ranges: the way to find what was written where
/// the system doesn't tell.
fn differing<'page>(memory: &[u8], expected: impl Fn(usize) -> &'page [u8]) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for (number, page) in memory.chunks_exact(PAGE).enumerate() {
        if page != expected(number) {
            let at = number * PAGE;
            match found.last_mut() {
                Some(last) if last.end == at => last.end += PAGE,
                _ => found.push(at..at + PAGE),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use crate::environment::{Environment, EnvironmentExt, EnvironmentOptions, Outcome};
    use crate::image::Store;
    use crate::wasm::{DirtyPages, Runtime, dirty_pages_method};

    /// Many pages that stay as they are, some that change all the time, one long row.
    const GROW: &str = "parts = [bytes([n % 256]) * 3000 for n in range(2000)]\nbig = bytearray(9_000_000)\nhot = [0] * 1000";
    const CHANGE: &str =
        "hot[n % 1000] = n; parts[n % 2000] = bytes([n % 7]) * 3000; big[n * 5000] = n % 256";
    const SHOW: &str =
        "import hashlib\nhashlib.sha256(b''.join(parts) + big + repr(hot).encode()).hexdigest()";

    #[tokio::test]
    async fn every_way_to_find_pages_finds_all_of_them() {
        let root = std::env::var_os("KAA_CACHE").map_or_else(
            || dirs::cache_dir().expect("a user has a cache directory").join("kaa"),
            Into::into,
        );
        let best = dirty_pages_method();
        eprintln!("the best way here is {best:?}");
        let all = [DirtyPages::Protect, DirtyPages::Scan, DirtyPages::Pagemap, DirtyPages::Compare];
        let possible = all.into_iter().skip_while(|method| *method != best);
        let mut digests = Vec::new();
        for method in possible {
            let store = Store::open(&root).unwrap();
            let runtime = Runtime::with_dirty_pages(store, method).unwrap();
            let image = runtime.image("base", &|_| {}).unwrap();
            let mut session = runtime.environment(&image, EnvironmentOptions::default()).unwrap();
            session.execute(GROW).await.unwrap();
            let mut snapshots = Vec::new();
            for n in 0..40 {
                session.execute(&format!("n = {n}\n{CHANGE}")).await.unwrap();
                if n % 10 == 0 {
                    let shown = session.execute(SHOW).await.unwrap();
                    let digest = shown.value.unwrap_or_else(|| shown.stderr.text().into_owned());
                    snapshots.push((session.snapshot().await.unwrap(), digest));
                }
                if n % 8 == 0 {
                    // Rolled back: none of it may stay.
                    let code = "for n in range(0, 1800): hot[n % 1000] = -1; big[n] = 255; parts[n] = b'x' * 3000\nimport os; os._exit(1)";
                    assert!(session.execute(code).await.unwrap().rolled_back);
                }
            }
            let shown = session.execute(SHOW).await.unwrap();
            assert_eq!(shown.outcome, Outcome::Completed, "{}", shown.stderr.text());
            let last = shown.value.unwrap();
            for (snapshot, digest) in snapshots.iter().rev() {
                session.restore(snapshot).await.unwrap();
                assert_eq!(session.execute(SHOW).await.unwrap().value.as_ref(), Some(digest));
            }
            digests.push((method, last, snapshots.into_iter().map(|(_, digest)| digest).collect()));
        }
        let expected: &(_, String, Vec<String>) = &digests[0];
        for found in &digests {
            assert_eq!((&found.1, &found.2), (&expected.1, &expected.2), "{:?}", found.0);
        }
    }
}
