//! Fiber stacks, used again instead of unmapped.
//!
//! A cell runs on a fiber, and a call back into the guest from an import on another. Unmapping a
//! stack interrupts every processor that runs a thread of this process, which costs more than a
//! small cell. So stacks go back to a pool with the pages that most cells touch still resident; what
//! a deep recursion touched beyond them is given back, when it happened.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use wasmtime::{StackCreator, StackMemory};

use super::memory::Reservation;

/// Inaccessible bytes below a stack.
const GUARD_BYTES: usize = 64 << 10;
/// Bytes at the top of a stack that stay resident.
const KEEP_BYTES: usize = 128 << 10;
/// Stacks that wait for use; more are unmapped.
const POOL_MAX: usize = 128;
/// Words below [`KEEP_BYTES`] that hold [`MARK`] while no deeper frame was there.
const MARK_WORDS: usize = 512;
const MARK: u64 = 0x6b61_612d_6d61_726b;

type Pool = Arc<Mutex<Vec<Reservation>>>;

/// Gives fibers their stacks.
#[derive(Debug, Default)]
pub(crate) struct StackPool {
    pool: Pool,
}

/// A stack in use.
struct PooledStack {
    /// `None` only while it is dropped.
    space: Option<Reservation>,
    pool: Pool,
}

impl PooledStack {
    fn space(&self) -> &Reservation {
        self.space.as_ref().expect("a stack has its space until it is dropped")
    }
}

// SAFETY: the range is page aligned (sizes are checked in `new_stack`), owned by this value alone,
// zero where no fiber was before, and has `GUARD_BYTES` of inaccessible memory below it.
#[expect(unsafe_code, reason = "wasmtime's trait for stacks is unsafe")]
unsafe impl StackMemory for PooledStack {
    fn top(&self) -> *mut u8 {
        let range = self.space().addresses();
        range.end as *mut u8
    }

    fn range(&self) -> Range<usize> {
        let range = self.space().addresses();
        range.start + GUARD_BYTES..range.end
    }

    fn guard_range(&self) -> Range<*mut u8> {
        let start = self.space().addresses().start;
        start as *mut u8..(start + GUARD_BYTES) as *mut u8
    }
}

impl Drop for PooledStack {
    fn drop(&mut self) {
        let Some(mut space) = self.space.take() else { return };
        let marks = mark_range(&space);
        if space.words(marks.clone()).iter().any(|word| *word != MARK) {
            if space.discard(GUARD_BYTES..marks.end).is_err() {
                return;
            }
            space.words(marks).fill(MARK);
        }
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < POOL_MAX {
            pool.push(space);
        }
    }
}

fn mark_range(space: &Reservation) -> Range<usize> {
    let addresses = space.addresses();
    let end = addresses.end - addresses.start - KEEP_BYTES;
    end - MARK_WORDS * size_of::<u64>()..end
}

// SAFETY: see `PooledStack`. wasmtime asks for zeroed stacks only when it's configured so, and those
// are made anew.
#[expect(unsafe_code, reason = "wasmtime's trait for stack creators is unsafe")]
unsafe impl StackCreator for StackPool {
    fn new_stack(&self, size: usize, zeroed: bool) -> wasmtime::Result<Box<dyn StackMemory>> {
        let bytes = GUARD_BYTES + size;
        wasmtime::ensure!(
            size.is_multiple_of(64 << 10) && size > 2 * KEEP_BYTES,
            "a stack of {size} bytes"
        );
        let pooled = self.pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let space = match pooled.filter(|space| !zeroed && space.len() == bytes) {
            Some(space) => space,
            None => {
                let mut space = Reservation::new(bytes)?;
                space.open(GUARD_BYTES..bytes)?;
                let marks = mark_range(&space);
                space.words(marks).fill(MARK);
                space
            }
        };
        Ok(Box::new(PooledStack { space: Some(space), pool: Arc::clone(&self.pool) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1 << 20;

    #[test]
    fn stacks_are_used_again_and_deep_ones_give_memory_back() {
        let pool = StackPool::default();
        let first = pool.new_stack(SIZE, false).unwrap();
        let (top, range) = (first.top(), first.range());
        assert_eq!(top as usize, range.end);
        assert_eq!(range.len(), SIZE);
        assert_eq!(first.guard_range().end as usize, range.start);
        let touch = |below_top: usize, value: u64| {
            #[expect(unsafe_code, reason = "writes as a fiber would")]
            // SAFETY: the address lies in the stack, which the test owns.
            unsafe {
                let at = top.byte_sub(below_top).cast::<u64>();
                let before = at.read();
                at.write(value);
                before
            }
        };
        touch(64, 1);
        drop(first);
        let second = pool.new_stack(SIZE, false).unwrap();
        assert_eq!(second.top(), top);
        assert_eq!(touch(64, 1), 1, "shallow pages stay resident");
        touch(KEEP_BYTES + 512, 2);
        touch(SIZE / 2, 3);
        drop(second);
        let third = pool.new_stack(SIZE, false).unwrap();
        assert_eq!(third.top(), top);
        assert_eq!(touch(SIZE / 2, 0), 0, "deep pages were given back");
    }
}
