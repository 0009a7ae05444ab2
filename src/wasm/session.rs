//! One live guest: its instance, its memory, and the checkpoint that it can go back to.

mod start;
mod states;

use std::sync::Arc;

use futures_util::FutureExt;
use wasmtime::{Instance, Store, Val};
use wasmtime_wasi::I32Exit;

pub(crate) use self::start::Start;
use self::start::{IDLE_MAX, Idle};
pub(crate) use self::states::RUN_BYTES;
use super::budget::Budget;
use super::guest::{Guest, Halt, Handles, LeaveGuard};
use super::instrument::{FLOOR_EXPORT, FUEL_EXPORT, FUNCTION_EXPORT_PREFIX};
use super::memory::{Run, Slot, with_slot};
use super::opening::Kept;
use super::state::State;
use super::text;
use crate::error::{Error, Result};
use crate::image::{Entry, GlobalRecord};
use crate::limits::{Limits, Usage};
use crate::tenant::Owner;

/// The C-API function that makes a signal pending: the soft stop.
pub(crate) const INTERRUPT_FUNCTION: &str = "PyErr_SetInterruptEx";

/// The C-API function that evaluates the agent's turn.
pub(crate) const EVAL_FUNCTION: &str = "PyEval_EvalCode";

/// What a turn runs.
#[derive(Clone, Copy)]
pub(crate) enum Turn {
    /// Source in `__main__`: before the agent is there, or its entry is known.
    Source(&'static str),
    /// The agent's entry.
    Entry(Entry),
}

/// How a turn ended.
pub(crate) enum TurnEnd {
    /// The guest returned.
    Returned,
    /// The guest left by `proc_exit`.
    Exited(i32),
    /// The host ended it.
    Halted(Halt),
    /// The machine stopped it.
    Trapped(String),
}

/// A live guest.
pub(crate) struct Session {
    start: Arc<Start>,
    owner: Owner,
    slot: Arc<Slot>,
    store: Option<Store<Guest>>,
    /// What is mapped over the slot's image.
    laid: Vec<Run>,
    checkpoint: State,
    /// Size of a memory larger than the image's with which the instance is of use to others: that of
    /// the template that the session is a child of. 0 for none.
    useful_bytes: usize,
    /// Whether pages of the slot can be protected.
    watched: bool,
}

impl Session {
    /// A new guest in the state of its image.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no address space left, [`Error::Internal`] when the module
    /// doesn't fit the engine.
    ///
    /// `make` gets what an instance that is used again has kept.
    pub(crate) fn new(
        start: Arc<Start>,
        owner: Owner,
        make: impl FnOnce(Option<Kept>) -> Result<Guest>,
    ) -> Result<Self> {
        let bytes = start.memory.bytes();
        Self::of_size(start, owner, make, bytes)
    }

    /// A new guest in the state of its image, with an instance whose memory has this size if there is
    /// one.
    fn of_size(
        start: Arc<Start>,
        owner: Owner,
        make: impl FnOnce(Option<Kept>) -> Result<Guest>,
        bytes: usize,
    ) -> Result<Self> {
        let checkpoint = start.state()?;
        let (slot, mut store, bytes) = match start.take_idle(bytes, &owner) {
            Some(Idle { slot, store, bytes, owner: _ }) => (slot, store, bytes),
            None => (Arc::new(Slot::new(Arc::clone(&start.memory))?), None, 0),
        };
        let guest = make(store.as_mut().and_then(|store| store.data_mut().take_kept()))?;
        let mut session = Self {
            start,
            owner,
            slot,
            store: None,
            laid: Vec::new(),
            checkpoint,
            useful_bytes: 0,
            watched: false,
        };
        match store {
            Some(mut store) => {
                let before = std::mem::replace(store.data_mut(), guest);
                let guest = store.data_mut();
                guest.handles = before.handles;
                guest.memory_limit.take_instance(bytes, &before.memory_limit);
                session.store = Some(store);
            }
            None => session.instantiate(guest)?,
        }
        Ok(session)
    }

    /// A new guest in this state of another of the same image.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub(crate) fn in_state(
        start: Arc<Start>,
        owner: Owner,
        make: impl FnOnce(Option<Kept>) -> Result<Guest>,
        state: &State,
    ) -> Result<Self> {
        let mut session = Self::of_size(start, owner, make, state.bytes)?;
        session.restore(state)?;
        Ok(session)
    }

    /// Notes that others will begin with a memory of the same size.
    pub(crate) fn expect_siblings(&mut self) {
        self.useful_bytes = self.memory_bytes();
    }

    /// Ends the session. Its slot is made ready for another in the background.
    pub(crate) fn give_back(self) {
        // Outside a runtime the slot is not worth a wait: it's simply dropped.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let start = Arc::clone(&self.start);
        let worth = start.reusable && start.ended().len() < IDLE_MAX;
        if !worth {
            return;
        }
        start.ended().push(self);
        runtime.spawn(async move { start.recycle_ended(|_| true) });
    }

    /// Ends the session and keeps its slot for another, if its memory can be made the image again:
    /// every page that was written is copied back, and so are the globals. The instance is kept too,
    /// unless its memory has grown: a memory can't shrink.
    ///
    /// What an instance holds beside its memory doesn't carry anything over: a module that writes to
    /// a table isn't used again, and the engine's heap of exceptions can't be read by the guest.
    pub(crate) fn recycle(mut self) {
        let is_own = Arc::ptr_eq(self.slot.image(), &self.start.memory);
        if !is_own || !self.start.reusable {
            return;
        }
        let Ok(image) = self.start.state() else { return };
        let bytes = self.memory_bytes();
        let grown = bytes != image.bytes;
        let unfit = self.guest().running || (grown && bytes != self.useful_bytes);
        let stays_grown = grown && !unfit;
        if self.bring(&image).is_err() || (stays_grown && self.clear(image.bytes..bytes).is_err()) {
            return;
        }
        let store = self.store.take().filter(|_| !unfit);
        let store = match store {
            Some(mut store) => match store.data_mut().vacate() {
                Ok(()) => Some(store),
                Err(_) => return,
            },
            None => match Arc::get_mut(&mut self.slot).map(Slot::shrink) {
                Some(Ok(())) => None,
                _ => return,
            },
        };
        let bytes = if store.is_some() { bytes } else { image.bytes };
        // Nobody else has the slot then.
        self.start.keep_idle(Idle { slot: self.slot, store, bytes, owner: self.owner });
    }

    /// The state of the last checkpoint.
    pub(crate) fn checkpoint(&self) -> &State {
        &self.checkpoint
    }

    /// Size of the memory.
    fn memory_bytes(&mut self) -> usize {
        let store = self.store_mut();
        let memory = store.data().handles.as_ref().expect("an instance has handles").memory;
        memory.data_size(store)
    }

    /// The store's data.
    pub(crate) fn guest(&self) -> &Guest {
        self.store.as_ref().expect("a session has a store between its methods").data()
    }

    /// The store's data.
    pub(crate) fn guest_mut(&mut self) -> &mut Guest {
        self.store_mut().data_mut()
    }

    fn store_mut(&mut self) -> &mut Store<Guest> {
        self.store.as_mut().expect("a session has a store between its methods")
    }

    /// Makes an instance over the slot, whatever it holds.
    fn instantiate(&mut self, guest: Guest) -> Result<()> {
        let mut store = Store::new(&self.start.engine, guest);
        store.limiter(|guest| &mut guest.memory_limit);
        // Refused, and of no meaning, unless wasmtime's fuel is what is being measured.
        let _ = store.set_fuel(u64::MAX);
        // Likewise of none without epochs, and then the deadline is never looked at.
        store.epoch_deadline_async_yield_and_update(1);
        store.set_epoch_deadline(1);
        let pre = &self.start.module;
        // Without a start function nothing in it waits, so that one poll completes it.
        let instance = with_slot(&self.slot, || pre.instantiate_async(&mut store).now_or_never())
            .ok_or_else(|| Error::Internal("instantiating the guest did not complete".into()))?
            .map_err(|e| Error::Internal(format!("instantiating the guest: {e:#}")))?;
        let handles = exports(&mut store, &instance, &self.start.globals)
            .map_err(|e| Error::Internal(format!("the guest's exports: {e:#}")))?;
        set_globals(&mut store, &handles, &self.checkpoint.globals)?;
        let bytes = handles.memory.data_size(&store);
        let guest = store.data_mut();
        guest.memory_limit.memory_bytes = bytes;
        guest.handles = Some(Arc::new(handles));
        guest.running = false;
        self.store = Some(store);
        Ok(())
    }

    /// Runs one turn of the agent.
    ///
    /// If the future is dropped, [`Guest::running`] stays set and the session must roll back.
    pub(crate) async fn turn(&mut self, turn: Turn, limits: &Limits) -> (TurnEnd, Usage) {
        let store = self.store_mut();
        let handles = store.data().handles.clone().expect("an instance has handles");
        let guest = store.data_mut();
        let leave = LeaveGuard(Arc::clone(&guest.leave));
        guest.running = true;
        guest.fault = None;
        guest.refused_bytes = None;
        guest.budget = Budget::start(limits.clone());
        let grant = guest.budget.grant();
        let lowest = guest.budget.floor();
        let wasmtime_fuel = if handles.fuel.is_none() { store.get_fuel().ok() } else { None };
        let result = run(store, &handles, turn, (grant, lowest)).await;
        if result.is_err() {
            // An exception that nobody caught would be raised by the next call.
            store.take_pending_exception();
        }
        let left = handles.fuel.map_or(0, |fuel| fuel.get(&mut *store).i64().unwrap_or(0));
        let bytes = handles.memory.data_size(&*store) as u64;
        let guest = store.data_mut();
        let (limit, lowest) = (guest.budget.limit_at_floor(left), guest.budget.floor());
        let mut usage = guest.budget.finish(left, bytes);
        if handles.fuel.is_none() {
            usage.fuel = wasmtime_fuel
                .and_then(|before| Some(before.saturating_sub(store.get_fuel().ok()?)));
        }
        let guest = store.data_mut();
        let computed = guest.budget.take_unbilled();
        leave.finish(computed);
        let end = match result {
            Ok(_) => {
                guest.running = false;
                TurnEnd::Returned
            }
            Err(error) => match classify(&error) {
                // A loop that can't be stopped softly ran into the floor: see `meter.rs`.
                TurnEnd::Trapped(_) if left < lowest => {
                    guest.budget.note_stop(limit);
                    guest.conversation.stop(limit);
                    TurnEnd::Halted(Halt::HardStop)
                }
                end => end,
            },
        };
        (end, usage)
    }

    /// Memory and mutable globals, to be written into an image.
    pub(crate) fn state(&mut self) -> (&[u8], Vec<u64>) {
        let store = self.store.as_mut().expect("a session has a store between its methods");
        let handles = store.data().handles.clone().expect("an instance has handles");
        let globals =
            handles.globals.iter().map(|global| bits_of(global.get(&mut *store))).collect();
        (handles.memory.data(&*store), globals)
    }

    /// The guest's memory.
    pub(crate) fn memory_mut(&mut self) -> &mut [u8] {
        let store = self.store_mut();
        let handles = store.data().handles.clone().expect("an instance has handles");
        handles.memory.data_mut(store)
    }

    /// Calls an export of the guest by hand, when an image is booted.
    ///
    /// # Errors
    ///
    /// What the guest's trap says.
    pub(crate) async fn call_initialize(&mut self) -> wasmtime::Result<()> {
        let store = self.store_mut();
        let handles = store.data().handles.clone();
        match handles.as_ref().and_then(|handles| handles.initialize.as_ref()) {
            Some(initialize) => initialize.call_async(store, ()).await,
            None => Ok(()),
        }
    }

    /// Puts bytes into a buffer that the guest allocates, for good.
    ///
    /// # Errors
    ///
    /// When the guest has no memory for them.
    pub(crate) async fn place(&mut self, bytes: &[u8]) -> wasmtime::Result<u32> {
        let store = self.store_mut();
        let handles = Arc::clone(store.data().handles()?);
        let address = handles.host_alloc.call_async(&mut *store, bytes.len() as i32).await? as u32;
        let start = address as usize;
        let target =
            handles.memory.data_mut(store).get_mut(start..start.saturating_add(bytes.len()));
        let target = target.filter(|_| address != 0);
        target.ok_or_else(|| wasmtime::Error::msg("no memory"))?.copy_from_slice(bytes);
        Ok(address)
    }
}

fn set_globals(store: &mut Store<Guest>, handles: &Handles, values: &[Val]) -> Result<()> {
    for (global, value) in handles.globals.iter().zip(values) {
        let set = global.set(&mut *store, *value);
        set.map_err(|e| Error::Internal(format!("setting a global: {e:#}")))?;
    }
    Ok(())
}

async fn run(
    store: &mut Store<Guest>,
    handles: &Handles,
    turn: Turn,
    (grant, lowest): (i64, i64),
) -> wasmtime::Result<()> {
    if let (Some(fuel), Some(floor)) = (&handles.fuel, &handles.floor) {
        fuel.set(&mut *store, Val::I64(grant))?;
        floor.set(&mut *store, Val::I64(lowest))?;
    }
    match turn {
        Turn::Entry(Entry { code, names, .. }) => {
            let (code, names) = (code as i32, names as i32);
            let result = handles.eval_code.call_async(store, (code, names, names)).await?;
            // The agent catches everything and returns `None`, which is never freed.
            wasmtime::ensure!(result != 0, "the agent raised an exception");
        }
        Turn::Source(line) => {
            let length = line.len() as i32;
            let address = handles.host_alloc.call_async(&mut *store, length).await?;
            let start = address as u32 as usize;
            let memory = handles.memory.data_mut(&mut *store);
            let target = memory.get_mut(start..start.saturating_add(line.len()));
            let target = target.filter(|_| address != 0);
            target
                .ok_or_else(|| wasmtime::Error::msg("no memory"))?
                .copy_from_slice(line.as_bytes());
            handles.run_source.call_async(&mut *store, (address, length)).await?;
        }
    }
    Ok(())
}

fn classify(error: &wasmtime::Error) -> TurnEnd {
    if let Some(halt) = error.downcast_ref::<Halt>() {
        return TurnEnd::Halted(*halt);
    }
    if let Some(exit) = error.downcast_ref::<I32Exit>() {
        return TurnEnd::Exited(exit.0);
    }
    TurnEnd::Trapped(format!("{error:#}"))
}

fn exports(
    store: &mut Store<Guest>,
    instance: &Instance,
    globals: &[GlobalRecord],
) -> wasmtime::Result<Handles> {
    let missing = |name: &str| wasmtime::Error::msg(format!("the module does not export `{name}`"));
    let memory = instance.get_memory(&mut *store, "memory").ok_or_else(|| missing("memory"))?;
    let fuel = instance.get_global(&mut *store, FUEL_EXPORT);
    let floor = instance.get_global(&mut *store, FLOOR_EXPORT);
    let mut mutable = Vec::with_capacity(globals.len());
    for record in globals {
        let global = instance.get_global(&mut *store, &record.export);
        mutable.push(global.ok_or_else(|| missing(&record.export))?);
    }
    let function = |name: &str| format!("{FUNCTION_EXPORT_PREFIX}{name}");
    Ok(Handles {
        memory,
        globals: mutable.into(),
        fuel,
        floor,
        host_alloc: instance.get_typed_func(&mut *store, "host_alloc")?,
        interrupt: instance.get_typed_func(&mut *store, &function(INTERRUPT_FUNCTION))?,
        run_source: instance.get_typed_func(&mut *store, "turn")?,
        eval_code: instance.get_typed_func(&mut *store, &function(EVAL_FUNCTION))?,
        new_text: instance.get_typed_func(&mut *store, &function(text::NEW_FUNCTION))?,
        set_item: instance.get_typed_func(&mut *store, &function(text::SET_ITEM_FUNCTION))?,
        initialize: instance.get_typed_func(&mut *store, "_initialize").ok(),
    })
}

/// A recorded global as a value.
fn value_of(record: &GlobalRecord) -> Result<Val> {
    Ok(match record.type_name.as_str() {
        "i32" => Val::I32(record.bits as u32 as i32),
        "i64" => Val::I64(record.bits as i64),
        "f32" => Val::F32(record.bits as u32),
        "f64" => Val::F64(record.bits),
        other => {
            return Err(Error::Incompatible {
                what: format!("the image's global `{}`", record.export),
                expected: "a number".into(),
                found: other.to_owned(),
            });
        }
    })
}

fn bits_of(value: Val) -> u64 {
    match value {
        Val::I32(value) => u64::from(value as u32),
        Val::I64(value) => value as u64,
        Val::F32(bits) => u64::from(bits),
        Val::F64(bits) => bits,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
