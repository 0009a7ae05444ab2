//! One live guest: its instance, its memory, and the checkpoint that it can go back to.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use wasmtime::{Engine, Instance, InstancePre, Store, Val};
use wasmtime_wasi::I32Exit;

use super::budget::Budget;
use super::guest::{Guest, Halt, Handles};
use super::instrument::{FLOOR_EXPORT, FUEL_EXPORT, FUNCTION_EXPORT_PREFIX};
use super::memory::{MemoryImage, Slot, with_slot};
use super::wasi::close_since_checkpoint;
use crate::error::{Error, Result};
use crate::image::{Entry, GlobalRecord};
use crate::limits::{Limits, Usage};

/// The C-API function that makes a signal pending: the soft stop.
pub(crate) const INTERRUPT_FUNCTION: &str = "PyErr_SetInterruptEx";
/// Bytes of a page of the host, the grain of a checkpoint. Larger pages are several of these.
const PAGE: usize = 4096;

/// What every session of an image starts from. Immutable, shared.
pub(crate) struct Start {
    pub(crate) engine: Engine,
    pub(crate) module: InstancePre<Guest>,
    pub(crate) memory: Arc<MemoryImage>,
    pub(crate) globals: Vec<GlobalRecord>,
    /// Whether memory and globals are all that an instance changes.
    reusable: bool,
    idle: Mutex<Vec<Idle>>,
}

/// Instances per image that wait to be used again. Each keeps the pages resident that its sessions
/// wrote, a megabyte or two.
const IDLE_MAX: usize = 32;

/// An instance whose memory is the image again.
struct Idle {
    slot: Arc<Slot>,
    store: Store<Guest>,
}

impl Start {
    pub(crate) fn new(
        engine: Engine,
        module: InstancePre<Guest>,
        memory: Arc<MemoryImage>,
        globals: Vec<GlobalRecord>,
        reusable: bool,
    ) -> Self {
        Self { engine, module, memory, globals, reusable, idle: Mutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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

/// A state that a session can go back to: what differs from the image.
#[derive(Default)]
struct Checkpoint {
    bytes: usize,
    globals: Vec<Val>,
    /// Page number to its place in `pages`.
    index: BTreeMap<usize, usize>,
    pages: Vec<u8>,
}

/// Bytes that a session may have written before its checkpoint becomes an image of its own, from
/// which it goes on. A smaller checkpoint is a copy of the written pages beside them, compared after
/// every cell; for a session that holds 100 MB that would double its memory and take longer than its
/// cells.
const CHECKPOINT_BYTES_MAX: usize = 16 << 20;

/// A live guest.
pub(crate) struct Session {
    start: Arc<Start>,
    slot: Arc<Slot>,
    store: Option<Store<Guest>>,
    checkpoint: Checkpoint,
}

impl Session {
    /// A new guest in the state of its image.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no address space left, [`Error::Internal`] when the module
    /// doesn't fit the engine.
    pub(crate) fn new(start: Arc<Start>, guest: Guest) -> Result<Self> {
        let globals = start.globals.iter().map(value_of).collect::<Result<Vec<_>>>()?;
        let bytes = start.memory.bytes();
        let checkpoint = Checkpoint { bytes, globals, ..Checkpoint::default() };
        let idle = start.idle().pop();
        if let Some(Idle { slot, mut store }) = idle {
            let before = std::mem::replace(store.data_mut(), guest);
            let guest = store.data_mut();
            guest.handles = before.handles;
            guest.memory_limit.memory_bytes = bytes;
            return Ok(Self { start, slot, store: Some(store), checkpoint });
        }
        let slot = Arc::new(Slot::new(Arc::clone(&start.memory))?);
        let mut session = Self { start, slot, store: None, checkpoint };
        session.instantiate(guest)?;
        Ok(session)
    }

    /// Ends the session and keeps its instance for another, if its memory can be made the image
    /// again: every page that was written is copied back, and so are the globals.
    ///
    /// What the instance holds beside its memory doesn't carry anything over: a module that writes to
    /// a table isn't used again, and the engine's heap of exceptions can't be read by the guest.
    pub(crate) fn recycle(mut self) {
        let Some(mut store) = self.store.take() else { return };
        let Some(handles) = store.data().handles.clone() else { return };
        let image = Arc::clone(self.slot.image());
        let grown = handles.memory.data_size(&store) != image.bytes()
            || !Arc::ptr_eq(&image, &self.start.memory);
        let unfit = grown || !self.start.reusable;
        if unfit || store.data().running || self.start.idle().len() >= IDLE_MAX {
            return;
        }
        let Ok(written) = self.slot.written() else { return };
        let memory = handles.memory.data_mut(&mut store);
        let copied = written.into_iter().all(|range| image.copy_to(memory, range).is_ok());
        let globals = self.start.globals.iter().zip(handles.globals.iter());
        let reset = globals.into_iter().all(|(record, global)| {
            value_of(record).is_ok_and(|value| global.set(&mut store, value).is_ok())
        });
        if copied && reset && store.data_mut().vacate().is_ok() {
            let idle = Idle { slot: Arc::clone(&self.slot), store };
            self.start.idle().push(idle);
        }
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
        let pre = &self.start.module;
        // Without a start function nothing in it waits, so that one poll completes it.
        let instance = with_slot(&self.slot, || pre.instantiate_async(&mut store).now_or_never())
            .ok_or_else(|| Error::Internal("instantiating the guest did not complete".into()))?
            .map_err(|e| Error::Internal(format!("instantiating the guest: {e:#}")))?;
        let handles = exports(&mut store, &instance, &self.start.globals)
            .map_err(|e| Error::Internal(format!("the guest's exports: {e:#}")))?;
        for (global, value) in handles.globals.iter().zip(&self.checkpoint.globals) {
            global
                .set(&mut store, *value)
                .map_err(|e| Error::Internal(format!("setting a global: {e:#}")))?;
        }
        let bytes = handles.memory.data_size(&store);
        let guest = store.data_mut();
        guest.memory_limit.memory_bytes = bytes;
        guest.handles = Some(handles);
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
        guest.running = true;
        guest.fault = None;
        guest.refused_bytes = None;
        guest.signal.take();
        guest.budget = Budget::start(limits.clone());
        let grant = guest.budget.grant();
        let lowest = guest.budget.floor();
        let wasmtime_fuel = if handles.fuel.is_none() { store.get_fuel().ok() } else { None };
        let result = run(store, &handles, turn, (grant, lowest)).await;
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

    /// Saves the present state as the one to go back to: only what changed since the last time is
    /// copied.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no memory for it; the session is lost then.
    pub(crate) fn save(&mut self) -> Result<()> {
        let written = self.slot.written();
        let store = self.store.as_mut().expect("a session has a store between its methods");
        store.data_mut().files.keep();
        let handles = store.data().handles.clone().expect("an instance has handles");
        self.checkpoint.globals =
            handles.globals.iter().map(|global| global.get(&mut *store)).collect();
        let memory = handles.memory.data(&*store);
        self.checkpoint.bytes = memory.len();
        let written_bytes =
            written.as_ref().map_or(0, |ranges| ranges.iter().map(Range::len).sum());
        if written_bytes > CHECKPOINT_BYTES_MAX {
            let image = Arc::new(MemoryImage::of(memory)?);
            self.checkpoint.index.clear();
            self.checkpoint.pages = Vec::new();
            return self.rebuild(&image, image.bytes());
        }
        match written {
            Ok(ranges) => ranges.into_iter().for_each(|range| self.checkpoint.copy(memory, range)),
            Err(_) => {
                let image = Arc::clone(self.slot.image());
                image.differing(memory, |range| self.checkpoint.copy(memory, range));
            }
        }
        Ok(())
    }

    /// Goes back to the last checkpoint with a new instance. Open files stay open.
    ///
    /// # Errors
    ///
    /// When the system refuses a mapping; the session is lost then.
    pub(crate) fn roll_back(&mut self) -> Result<()> {
        close_since_checkpoint(self.guest_mut());
        let (image, bytes) = (Arc::clone(self.slot.image()), self.checkpoint.bytes);
        self.rebuild(&image, bytes)?;
        let checkpoint = &self.checkpoint;
        let store = self.store.as_mut().expect("just rebuilt");
        let memory = store.data().handles.as_ref().expect("just rebuilt").memory;
        let memory = memory.data_mut(store);
        for (page, at) in &checkpoint.index {
            memory[page * PAGE..][..PAGE].copy_from_slice(&checkpoint.pages[*at..][..PAGE]);
        }
        Ok(())
    }

    /// A new instance over `image`, with the globals of the checkpoint.
    fn rebuild(&mut self, image: &Arc<MemoryImage>, bytes: usize) -> Result<()> {
        let store = self.store.take();
        let mut guest = store.expect("a session has a store between its methods").into_data();
        guest.handles = None;
        guest.memory_limit.memory_bytes = 0;
        let slot = Arc::get_mut(&mut self.slot)
            .ok_or_else(|| Error::Internal("an instance outlived its store".into()))?;
        slot.rewind(image, bytes)?;
        self.instantiate(guest)
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
        let instance_start = store.data().handles.clone().and_then(|handles| handles.initialize);
        match instance_start {
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
        let handles = store.data().handles()?;
        let address = handles.host_alloc.call_async(&mut *store, bytes.len() as i32).await? as u32;
        let start = address as usize;
        let target =
            handles.memory.data_mut(store).get_mut(start..start.saturating_add(bytes.len()));
        let target = target.filter(|_| address != 0);
        target.ok_or_else(|| wasmtime::Error::msg("no memory"))?.copy_from_slice(bytes);
        Ok(address)
    }
}

impl Checkpoint {
    /// Copies the pages of `range` that aren't in the checkpoint as they are.
    fn copy(&mut self, memory: &[u8], range: Range<usize>) {
        for page in range.start / PAGE..range.end / PAGE {
            let now = &memory[page * PAGE..][..PAGE];
            match self.index.get(&page) {
                Some(at) => {
                    let saved = &mut self.pages[*at..][..PAGE];
                    if saved != now {
                        saved.copy_from_slice(now);
                    }
                }
                None => {
                    self.index.insert(page, self.pages.len());
                    self.pages.extend_from_slice(now);
                }
            }
        }
    }
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
        Turn::Entry(Entry { code, names }) => {
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
    let interrupt = format!("{FUNCTION_EXPORT_PREFIX}{INTERRUPT_FUNCTION}");
    let eval_code = format!("{FUNCTION_EXPORT_PREFIX}{EVAL_FUNCTION}");
    Ok(Handles {
        memory,
        globals: mutable.into(),
        fuel,
        floor,
        host_alloc: instance.get_typed_func(&mut *store, "host_alloc")?,
        interrupt: instance.get_typed_func(&mut *store, &interrupt)?,
        run_source: instance.get_typed_func(&mut *store, "turn")?,
        eval_code: instance.get_typed_func(&mut *store, &eval_code)?,
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
mod tests {
    use std::time::Duration;

    use crate::environment::{EnvironmentExt, EnvironmentOptions};
    use crate::image::Store;
    use crate::wasm::Runtime;

    #[tokio::test]
    async fn nothing_of_a_tenant_is_left_in_a_recycled_instance() {
        let root = std::env::var_os("KAA_CACHE").map_or_else(
            || dirs::cache_dir().expect("a user has a cache directory").join("kaa"),
            Into::into,
        );
        let runtime = Runtime::open(Store::open(root).unwrap()).unwrap();
        let image = runtime.image("base", &|_| {}).unwrap();
        let mut tenant = runtime.environment(&image, EnvironmentOptions::default()).unwrap();
        let secrets = "import json\njson.secret = 'hunter2'\nx = ['hunter2' * n for n in range(50)]\n\
                       def f(n): return f(n - 1) if n else x\nf(100)\nopen('/tmp/f', 'w').write('s')";
        assert!(tenant.execute(secrets).await.unwrap().exception.is_none());
        drop(tenant);
        let start = &image.0.start;
        for _ in 0..1000 {
            if !start.idle().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut idle = start.idle().pop().expect("the instance is used again");
        let handles = idle.store.data().handles.clone().unwrap();
        let memory = handles.memory.data(&idle.store);
        assert_eq!(memory.len(), start.memory.bytes());
        start.memory.differing(memory, |range| panic!("{range:?} is not as in the image"));
        for (record, global) in start.globals.iter().zip(handles.globals.iter()) {
            assert_eq!(super::bits_of(global.get(&mut idle.store)), record.bits);
        }
    }
}
