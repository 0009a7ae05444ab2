//! Randomness of a session with a seed: a stream whose place can be saved and gone on from.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::TryRng;
use sha2::{Digest, Sha256};

/// Bytes of one block of the stream.
const BLOCK: u64 = 32;

/// SHA-256 of seed and block number, block after block: the same on every machine and in every
/// version, which no generator of `rand` promises.
#[derive(Debug)]
pub(crate) struct SeededRandom {
    seed: u64,
    /// Bytes that were taken.
    position: AtomicU64,
}

impl SeededRandom {
    pub(crate) fn new(seed: u64, position: u64) -> Arc<Self> {
        Arc::new(Self { seed, position: AtomicU64::new(position) })
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn position(&self) -> u64 {
        self.position.load(Ordering::Acquire)
    }

    pub(crate) fn go_to(&self, position: u64) {
        self.position.store(position, Ordering::Release);
    }

    fn fill(&self, target: &mut [u8]) {
        let mut at = self.position.fetch_add(target.len() as u64, Ordering::AcqRel);
        let mut rest = target;
        while !rest.is_empty() {
            let mut hasher = Sha256::new();
            hasher.update(self.seed.to_le_bytes());
            hasher.update((at / BLOCK).to_le_bytes());
            let block = hasher.finalize();
            let from = (at % BLOCK) as usize;
            let count = rest.len().min(BLOCK as usize - from);
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&block[from..from + count]);
            rest = later;
            at = at.wrapping_add(count as u64);
        }
    }
}

/// The stream as wasmtime-wasi takes it.
pub(super) struct SeededRng(pub(super) Arc<SeededRandom>);

impl TryRng for SeededRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.0.fill(&mut bytes);
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Infallible> {
        self.0.fill(target);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_goes_on_from_any_place() {
        let (whole, parts) = (SeededRandom::new(7, 0), SeededRandom::new(7, 0));
        let mut expected = [0; 100];
        whole.fill(&mut expected);
        let mut found = [0; 100];
        parts.fill(&mut found[..3]);
        parts.fill(&mut found[3..64]);
        SeededRandom::new(7, parts.position()).fill(&mut found[64..]);
        assert_eq!(found, expected);
        let mut other = [0; 100];
        SeededRandom::new(8, 0).fill(&mut other);
        assert_ne!(other, expected);
    }
}
