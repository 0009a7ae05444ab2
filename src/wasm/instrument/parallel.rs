//! Work on many items on all processors, with results in order.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::InstrumentError;

/// Runs `work` on slices of `items` (with the index of their first item) on all processors, and
/// returns the results in order.
pub(super) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(usize, &[T]) -> Result<R, InstrumentError> + Sync,
) -> Result<Vec<R>, InstrumentError> {
    const ITEMS_MIN: usize = 64;
    // Slices of equal count differ in bytes: more of them than threads even that out.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let slice = items.len().div_ceil(threads * 8).max(ITEMS_MIN);
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let first = next.fetch_add(slice, Ordering::Relaxed);
            if first >= items.len() {
                return done;
            }
            let end = items.len().min(first + slice);
            done.push((first, work(first, &items[first..end])));
        }
    };
    let mut results = if items.len() <= slice {
        run()
    } else {
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            let joined = handles.into_iter().map(|handle| handle.join());
            joined.flat_map(|done| done.unwrap_or_else(|panic| resume_unwind(panic))).collect()
        })
    };
    results.sort_by_key(|(first, _)| *first);
    results.into_iter().map(|(_, result)| result).collect()
}
