//! What every session of an image starts from: its memory and globals, and the slots that sessions have
//! left for others.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wasmtime::{Engine, InstancePre, Store, Val};

use super::super::dirty::DirtyPages;
use super::super::guest::Guest;
use super::super::memory::{MemoryImage, Slot};
use super::super::state::State;
use super::{Session, bits_of, value_of};
use crate::error::{Error, Result};
use crate::image::GlobalRecord;
use crate::tenant::Owner;

/// What every session of an image starts from. Immutable, shared.
pub(crate) struct Start {
    pub(crate) engine: Engine,
    pub(crate) module: InstancePre<Guest>,
    pub(crate) memory: Arc<MemoryImage>,
    pub(crate) globals: Vec<GlobalRecord>,
    /// Whether memory and globals are all that an instance changes.
    pub(super) reusable: bool,
    pub(crate) dirty_pages: DirtyPages,
    idle: Mutex<Vec<Idle>>,
    /// Sessions that have ended and are not yet idle slots.
    ended: Mutex<Vec<Session>>,
}

/// Slots per image that wait to be used again. Each keeps the pages resident that its tenant's
/// sessions wrote, a megabyte or two.
pub(super) const IDLE_MAX: usize = 32;

/// A slot whose memory is the image again, and its instance if that can be used again too.
pub(super) struct Idle {
    pub(super) slot: Arc<Slot>,
    pub(super) store: Option<Store<Guest>>,
    /// Size of the memory; what is beyond the image is zeros. More than the image only for children of
    /// a template that is larger: a memory can't shrink.
    pub(super) bytes: usize,
    /// Whose session had it.
    pub(super) owner: Owner,
}

impl Idle {
    /// The same as if nobody had used it: to write or to read a page costs less where it's resident, so
    /// that another tenant would learn which of them this one's sessions did.
    fn forget(mut self, image: &Arc<MemoryImage>) -> Option<Self> {
        let forgotten = match &mut self.store {
            Some(store) => {
                let memory = store.data().handles.as_ref().expect("an instance has handles").memory;
                self.slot.uncover(memory.data_mut(store), 0..self.bytes)
            }
            None => Arc::get_mut(&mut self.slot)?.rewind(image, self.bytes),
        };
        forgotten.ok().map(|()| self)
    }
}

impl Start {
    pub(crate) fn new(
        engine: Engine,
        module: InstancePre<Guest>,
        memory: Arc<MemoryImage>,
        globals: Vec<GlobalRecord>,
        reusable: bool,
        dirty_pages: DirtyPages,
    ) -> Self {
        let idle = Mutex::default();
        let ended = Mutex::default();
        Self { engine, module, memory, globals, reusable, dirty_pages, idle, ended }
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ended(&self) -> MutexGuard<'_, Vec<Session>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot to use again for a memory of this size. Preparing one that has just been given back takes
    /// a tenth of what a new one costs; one of another tenant comes without its resident pages.
    pub(super) fn take_idle(&self, bytes: usize, owner: &Owner) -> Option<Idle> {
        self.find_idle(bytes, |whose| whose.is(owner)).or_else(|| {
            let idle = self.find_idle(bytes, |_| true)?;
            if idle.owner.is(owner) { Some(idle) } else { idle.forget(&self.memory) }
        })
    }

    /// One of these owners, also one that is not ready yet.
    fn find_idle(&self, bytes: usize, is_good: impl Fn(&Owner) -> bool) -> Option<Idle> {
        let find = || {
            let mut idle = self.idle();
            let of_size = |bytes: usize| {
                idle.iter().rposition(|idle| idle.bytes == bytes && is_good(&idle.owner))
            };
            // A smaller memory grows, a larger one is of no use.
            let at = of_size(bytes).or_else(|| of_size(self.memory.bytes()))?;
            Some(idle.remove(at))
        };
        find().or_else(|| {
            self.recycle_ended(&is_good);
            find()
        })
    }

    /// Prepares the slot of a session of one of these owners, if there is one.
    pub(super) fn recycle_ended(&self, is_good: impl Fn(&Owner) -> bool) {
        let ended = {
            let mut ended = self.ended();
            ended.iter().rposition(|ended| is_good(&ended.owner)).map(|at| ended.remove(at))
        };
        if let Some(ended) = ended {
            ended.recycle();
        }
    }

    /// Keeps a slot for another session. When there are enough, one of another size has to go: there
    /// may be no session of that size any more.
    pub(super) fn keep_idle(&self, new: Idle) {
        let mut idle = self.idle();
        if idle.len() >= IDLE_MAX {
            let Some(at) = idle.iter().position(|old| old.bytes != new.bytes) else { return };
            idle.remove(at);
        }
        idle.push(new);
    }

    /// Recorded globals as values, if they are those of the image.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when they aren't.
    pub(crate) fn values(&self, records: &[GlobalRecord]) -> Result<Vec<Val>> {
        let kinds = |records: &[GlobalRecord]| -> Vec<(String, String)> {
            let kind = |one: &GlobalRecord| (one.export.clone(), one.type_name.clone());
            records.iter().map(kind).collect()
        };
        if kinds(records) != kinds(&self.globals) {
            return Err(Error::Incompatible {
                what: "the snapshot".into(),
                expected: format!("the {} globals of its image", self.globals.len()),
                found: format!("{} others", records.len()),
            });
        }
        records.iter().map(value_of).collect()
    }

    /// The image's records with these values.
    pub(crate) fn records(globals: &[GlobalRecord], values: &[Val]) -> Vec<GlobalRecord> {
        let record = |(record, value): (&GlobalRecord, &Val)| GlobalRecord {
            bits: bits_of(*value),
            ..record.clone()
        };
        globals.iter().zip(values).map(record).collect()
    }

    /// The state in which a session of the image begins.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] for a global that isn't a number.
    pub(crate) fn state(&self) -> Result<State> {
        let globals = self.globals.iter().map(value_of).collect::<Result<Vec<_>>>()?;
        Ok(State::of(Arc::clone(&self.memory), globals))
    }
}
