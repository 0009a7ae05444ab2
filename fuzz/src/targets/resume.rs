//! Snapshots whose file is good and whose contents are harm: sessions that go on from them.
//!
//! An input is steps, each of which changes something in the snapshot of a good session:
//!
//! | byte | what |
//! |---|---|
//! | 0 | bits of a byte of a page that the session wrote |
//! | 1 | a word of one |
//! | 2 | any page of the memory: zeros, ones, or noise |
//! | 3 | a page that the session wrote becomes another's copy |
//! | 4 | one is that of the image again |
//! | 5 | a global |
//! | 6 | a field of the header, as JSON |
//! | 7 | a file, a directory or a link |
//! | 8 | words of a page, which lead elsewhere in the memory |
//!
//! What has to hold: the snapshot is refused, or loaded, resumed, restored, forked, hibernated and run,
//! and whatever comes of that, it ends within its limits and isn't a fault of Kaa's own; a session that
//! went back to it works when it is begun anew; and what another session has stays as it is.

use std::sync::{LazyLock, Mutex, PoisonError};

use kaa::WasmEnvironment;
use serde_json::Value as Json;
use tokio::runtime::Runtime;

use super::files::{PAGE, Parts, bystander, check_others, options, suffer, victim};
use super::input::Input;

/// What goes on beside the input.
struct World {
    runtime: Runtime,
    directory: tempfile::TempDir,
    good: Parts,
    bystander: WasmEnvironment,
    round: u64,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| Mutex::new(World::new()));

pub(crate) fn run(input: &[u8]) -> bool {
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let World { runtime, directory, good, bystander, round } = &mut *world;
    let (mut parts, mut input) = (good.clone(), Input(input));
    while !input.is_empty() {
        change(&mut parts, &mut input);
    }
    let path = directory.path().join("snapshot");
    parts.write(&path);
    runtime.block_on(async {
        let end = suffer("the snapshot", &path, options()).await;
        check_others("the snapshot", bystander, round).await;
        end.is_ok()
    })
}

impl World {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (good, bystander) =
            runtime.block_on(async { (victim(directory.path()).await, bystander().await) });
        Self { runtime, directory, good, bystander, round: 0 }
    }
}

fn change(parts: &mut Parts, input: &mut Input<'_>) {
    match input.u8() % 9 {
        0 => {
            let page = written(parts, input);
            let (at, bits) = (usize::from(input.u16()) % PAGE, input.u8());
            if let Some(page) = page {
                page[at] ^= bits;
            }
        }
        1 => {
            let page = written(parts, input);
            let (at, word) = (usize::from(input.u16()) % (PAGE - 3), input.u32());
            if let Some(page) = page {
                page[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
        2 => {
            let number = input.u32() % parts.memory_pages();
            let page = match input.u8() {
                0 => vec![0; PAGE],
                1 => vec![0xff; PAGE],
                _ => noise(input.u64()).take(PAGE / 8).flat_map(u64::to_le_bytes).collect(),
            };
            parts.pages.insert(number, page);
        }
        3 => {
            if let Some(copy) = written(parts, input).cloned()
                && let Some(page) = written(parts, input)
            {
                *page = copy;
            }
        }
        4 => {
            if let Some(number) = number_of(parts, input.u16()) {
                parts.pages.remove(&number);
            }
        }
        5 => parts.global(input.u8().into(), input.u64()),
        6 => change_header(parts, input),
        7 => {
            let kind = 2 + input.u8() % 3;
            let path = String::from_utf8_lossy(input.string()).into_owned();
            parts.files.push((kind, path, input.string().to_vec()));
        }
        _ => {
            let page = written(parts, input);
            let (every, seed) = (1 + usize::from(input.u8()), input.u64());
            let words = page.into_iter().flat_map(|page| page.chunks_exact_mut(4));
            for (word, address) in words.step_by(every).zip(noise(seed)) {
                word.copy_from_slice(&((address % (50 << 20)) as u32).to_le_bytes());
            }
        }
    }
}

/// The number of one of the pages that the session wrote.
fn number_of(parts: &Parts, index: u16) -> Option<u32> {
    let count = parts.pages.len().max(1);
    parts.pages.keys().nth(usize::from(index) % count).copied()
}

fn written<'a>(parts: &'a mut Parts, input: &mut Input<'_>) -> Option<&'a mut Vec<u8>> {
    let number = number_of(parts, input.u16())?;
    parts.pages.get_mut(&number)
}

/// A field of the session's record, or of the header itself.
fn change_header(parts: &mut Parts, input: &mut Input<'_>) {
    let is_of_session = input.u8().is_multiple_of(2);
    let key = String::from_utf8_lossy(input.string()).into_owned();
    let Ok(value) = serde_json::from_slice::<Json>(input.string()) else { return };
    if is_of_session {
        parts.header["session"][key] = value;
    } else if !matches!(key.as_str(), "session" | "globals" | "memory_bytes") || is_sane(&value) {
        parts.header[key] = value;
    }
}

/// Whether a value has the form that other steps count on.
fn is_sane(value: &Json) -> bool {
    value.as_u64().is_some_and(|bytes| bytes > PAGE as u64)
}

/// SplitMix64.
fn noise(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |count: u64| {
        let mixed = seed.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}
