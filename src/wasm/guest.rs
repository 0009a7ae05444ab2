//! The store's data, and Kaa's own imports: the door (`host.call`) and the meter (`kaa.slice`).
//!
//! Everything here runs while a guest is on the stack. Pointers and lengths from the guest are
//! checked against the memory's present size on every use; what the host allocates for them is
//! bounded.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use wasmtime::{Caller, Global, Linker, Memory, ResourceLimiter, TypedFunc, Val};
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::p1::WasiP1Ctx;

use super::budget::{Budget, Verdict};
use super::clock::VirtualClock;
use super::files::{Files, Scratch};
use super::opening::Kept;
use super::random::SeededRandom;
use super::text::{self, Post};
use crate::agent::{Answer, Conversation, Signal, Streams};
use crate::environment::EnvironmentOptions;
use crate::error::Error;
use crate::limits::{Limit, Limits};
use crate::protocol::{CALL_BYTES_MAX, Call, Message, REPLY_BYTES_MAX};
use crate::snapshot::SessionRecord;
use crate::tenant::{Seat, Turn as Permit};

/// Bytes that cost one unit of fuel when the host moves them for the guest.
const BYTES_PER_FUEL: u64 = 1;
/// Fuel of a call of the host, beside the bytes: about half a microsecond.
const CALL_FUEL: i64 = 8_000;
/// `SIGINT`, the signal that stands for a soft stop.
const SIGINT: i32 = 2;
/// Answers of `host.call`: done, and a fault of the host.
const CALL_OK: i32 = 0;
const CALL_FAULT: i32 = -2;

/// Ends the guest from inside an import; the session rolls back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halt {
    /// The guest didn't yield to a soft stop.
    HardStop,
    /// The guest broke the protocol: [`Guest::fault`] says how.
    Fault,
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HardStop => "hard stop",
            Self::Fault => "protocol fault",
        })
    }
}

impl std::error::Error for Halt {}

/// A turn's leave to compute. It's shared between the store, for the imports, and the future of the
/// turn, so that a future that is dropped gives it back.
#[derive(Debug, Default)]
pub(crate) struct Leave(Mutex<Option<Permit>>);

impl Leave {
    pub(crate) fn set(&self, permit: Option<Permit>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = permit;
    }

    pub(crate) fn take(&self) -> Option<Permit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_contended(&self) -> bool {
        let permit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        permit.as_ref().is_some_and(Permit::is_contended)
    }
}

/// Gives the leave back when the turn is over, or its future is dropped.
pub(crate) struct LeaveGuard(pub(crate) Arc<Leave>);

impl LeaveGuard {
    /// The turn is over; so much was computed since the last charge.
    pub(crate) fn finish(self, computed: Duration) {
        if let Some(permit) = self.0.take() {
            permit.finish(computed);
        }
    }
}

impl Drop for LeaveGuard {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

/// What an instance exports that the host uses. Shared, because a clone of a function's handle counts
/// its type up in several places that all threads have in common: dearer than many a call.
pub(crate) struct Handles {
    pub(crate) memory: Memory,
    /// Mutable globals in the order of their index, without the fuel.
    pub(crate) globals: Arc<[Global]>,
    pub(crate) fuel: Option<Global>,
    pub(crate) floor: Option<Global>,
    pub(crate) host_alloc: TypedFunc<i32, i32>,
    pub(crate) interrupt: TypedFunc<i32, i32>,
    /// Runs source as a cell of a REPL.
    pub(crate) run_source: TypedFunc<(i32, i32), i32>,
    /// `PyEval_EvalCode(code, globals, locals)`.
    pub(crate) eval_code: TypedFunc<(i32, i32, i32), i32>,
    /// `PyUnicode_New(chars, largest)`.
    pub(crate) new_text: TypedFunc<(i32, i32), i32>,
    /// `PyList_SetItem(list, index, item)`.
    pub(crate) set_item: TypedFunc<(i32, i32, i32), i32>,
    pub(crate) initialize: Option<TypedFunc<(), ()>>,
}

/// Bounds the guest's memory: growth beyond it is refused, which Python raises as `MemoryError`.
#[derive(Debug)]
pub(crate) struct MemoryLimit {
    pub(crate) bytes_max: usize,
    pub(crate) memory_bytes: usize,
    pub(crate) table_bytes: usize,
    /// What the tenant has room for. The session holds it: what is left of one that is gone, or an
    /// image that is booted, has none.
    pub(crate) seat: Weak<Seat>,
}

/// What wasmtime allocates per table element.
const TABLE_ELEMENT_BYTES: usize = 16;

impl MemoryLimit {
    pub(crate) fn new(bytes_max: u64, seat: Weak<Seat>) -> Self {
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        Self { bytes_max, memory_bytes: 0, table_bytes: 0, seat }
    }

    /// Forgets the instance that there was: another will be counted from its start.
    pub(crate) fn begin_instance(&mut self) {
        (self.memory_bytes, self.table_bytes) = (0, 0);
    }

    /// Counts an instance that is there already, with so much memory and the tables that it had under
    /// the limit before.
    pub(crate) fn take_instance(&mut self, memory_bytes: usize, before: &Self) {
        (self.memory_bytes, self.table_bytes) = (memory_bytes, before.table_bytes);
    }
}

impl ResourceLimiter for MemoryLimit {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let others = self.memory_bytes.saturating_sub(current) + self.table_bytes;
        if current > 0 && desired.saturating_add(others) > self.bytes_max {
            return Ok(false);
        }
        let added = desired.saturating_sub(current) as u64;
        if current > 0 && self.seat.upgrade().is_some_and(|seat| !seat.grow(added)) {
            return Ok(false);
        }
        self.memory_bytes = self.memory_bytes.saturating_sub(current) + desired;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let added = desired.saturating_sub(current).saturating_mul(TABLE_ELEMENT_BYTES);
        if current > 0
            && added.saturating_add(self.memory_bytes + self.table_bytes) > self.bytes_max
        {
            return Ok(false);
        }
        self.table_bytes = self.table_bytes.saturating_add(added);
        Ok(true)
    }
}

/// The data of a session's store.
pub(crate) struct Guest {
    pub(crate) wasi: WasiP1Ctx,
    pub(crate) files: Files,
    /// `None` when an image is booted, and when no session has the instance.
    pub(crate) scratch: Option<Scratch>,
    /// Whether another session may have descriptors and scratch, as long as they are unused.
    pub(crate) plain: bool,
    pub(crate) clock: Option<Arc<VirtualClock>>,
    pub(crate) random: Option<Arc<SeededRandom>>,
    pub(crate) streams: Streams,
    pub(crate) conversation: Conversation,
    pub(crate) budget: Budget,
    pub(crate) memory_limit: MemoryLimit,
    /// The leave to compute, while a turn runs and doesn't wait.
    pub(crate) leave: Arc<Leave>,
    pub(crate) signal: Arc<Signal>,
    pub(crate) handles: Option<Arc<Handles>>,
    /// What the guest did wrong, for [`Halt::Fault`].
    pub(crate) fault: Option<Error>,
    /// Bytes of an answer that the guest had no memory for.
    pub(crate) refused_bytes: Option<usize>,
    /// Whether a turn began and hasn't ended: then the state is not to be trusted.
    pub(crate) running: bool,
    /// Where in the memory the list is that texts are left in: see `text.rs`.
    pub(crate) mailbox: Option<u32>,
}

impl Guest {
    /// The instance's exports.
    ///
    /// # Errors
    ///
    /// When an import is called before the instance exists, which no module without a start
    /// function can do.
    pub(crate) fn handles(&self) -> wasmtime::Result<&Arc<Handles>> {
        let handles = self.handles.as_ref();
        handles.ok_or_else(|| wasmtime::Error::msg("an import was called too early"))
    }

    /// What a snapshot has of this, beside the files.
    pub(crate) fn record(&self) -> SessionRecord {
        let (cells, told) = self.conversation.record();
        SessionRecord {
            cells,
            told,
            seed: self.random.as_ref().map(|random| random.seed()),
            random_bytes: self.random.as_ref().map_or(0, |random| random.position()),
            clock: self.clock.as_ref().map(|clock| clock.record()),
            mount_bytes: self.files.mount_bytes(),
        }
    }

    /// Lets go of everything that belongs to a tenant. What stays is the instance's handles, and
    /// descriptors and scratch directory if they were never used.
    ///
    /// # Errors
    ///
    /// None that a default configuration has.
    pub(crate) fn vacate(&mut self) -> crate::error::Result<()> {
        let empty = || WasiCtxBuilder::new().build_p1();
        let (wasi, scratch) = match self.scratch.take() {
            Some(scratch) if self.plain && self.files.is_unused() => {
                (std::mem::replace(&mut self.wasi, empty()), Some(scratch))
            }
            _ => (empty(), None),
        };
        let mut memory_limit = MemoryLimit::new(0, Weak::new());
        memory_limit.take_instance(0, &self.memory_limit);
        *self = Self {
            wasi,
            files: Files::new(Path::new(""), 0, &[], 0),
            scratch,
            plain: false,
            clock: None,
            random: None,
            streams: Streams::default(),
            conversation: Conversation::new(&EnvironmentOptions::default(), [0; 16])?,
            budget: Budget::start(Limits::default()),
            memory_limit,
            leave: Arc::default(),
            signal: Arc::default(),
            handles: self.handles.take(),
            fault: None,
            refused_bytes: None,
            running: false,
            mailbox: None,
        };
        Ok(())
    }

    /// What a vacated instance has for the next session.
    pub(crate) fn take_kept(&mut self) -> Option<Kept> {
        let scratch = self.scratch.take()?;
        let wasi = std::mem::replace(&mut self.wasi, WasiCtxBuilder::new().build_p1());
        Some(Kept { wasi, scratch })
    }

    fn fault(&mut self, error: Error) -> wasmtime::Error {
        self.fault = Some(error);
        Halt::Fault.into()
    }
}

/// Adds Kaa's own imports.
///
/// # Errors
///
/// When the linker refuses a definition.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.func_wrap_async("kaa", "slice", |caller: Caller<'_, Guest>, (): ()| {
        Box::new(slice(caller))
    })?;
    linker.func_wrap_async(
        "host",
        "call",
        |caller: Caller<'_, Guest>, (ptr, len, out_ptr, out_len): (i32, i32, i32, i32)| {
            Box::new(call(caller, ptr as u32, len as u32, out_ptr as u32, out_len as u32))
        },
    )?;
    Ok(())
}

/// One slice is used up: the only place where a computing guest is looked at.
async fn slice(mut caller: Caller<'_, Guest>) -> wasmtime::Result<()> {
    let handles = caller.data().handles()?;
    let (Some(fuel), Some(floor)) = (handles.fuel, handles.floor) else { return Ok(()) };
    let left = fuel.get(&mut caller).i64().unwrap_or(0);
    let guest = caller.data_mut();
    // One that comes before the guest has its cell stops it when it has.
    let interrupted = guest.conversation.is_told() && guest.signal.take();
    guest.budget.use_short_slices(guest.leave.is_contended());
    let verdict = guest.budget.slice(left, interrupted);
    let grant = caller.data().budget.grant();
    fuel.set(&mut caller, Val::I64(grant))?;
    let lowest = caller.data().budget.floor();
    floor.set(&mut caller, Val::I64(lowest))?;
    match verdict {
        Verdict::Continue => {}
        Verdict::SoftStop(limit) => soft_stop(&mut caller, limit).await?,
        Verdict::HardStop => return Err(Halt::HardStop.into()),
    }
    let guest = caller.data_mut();
    guest.budget.pause();
    let computed = guest.budget.take_unbilled();
    match guest.leave.take() {
        Some(mut permit) => {
            permit.slice_end(computed).await;
            caller.data().leave.set(Some(permit));
        }
        None => tokio::task::yield_now().await,
    }
    caller.data_mut().budget.resume();
    Ok(())
}

/// Makes CPython raise at its next check; the agent then asks why.
async fn soft_stop(caller: &mut Caller<'_, Guest>, limit: Limit) -> wasmtime::Result<()> {
    let handles = Arc::clone(caller.data().handles()?);
    caller.data_mut().conversation.stop(limit);
    handles.interrupt.call_async(caller, SIGINT).await?;
    Ok(())
}

/// Charges fuel for a call of the host that moves so many bytes, and ends the slice when it has
/// taken too long: calls take time that fuel doesn't show. The next check of the guest notices.
pub(crate) fn charge_call(caller: &mut Caller<'_, Guest>, bytes: u64) -> wasmtime::Result<()> {
    if let Some(fuel) = caller.data().handles()?.fuel {
        let mut left = fuel.get(&mut *caller).i64().unwrap_or(0);
        let cost = i64::try_from(bytes / BYTES_PER_FUEL).unwrap_or(i64::MAX);
        left = left.saturating_sub(cost.saturating_add(CALL_FUEL));
        let budget = &mut caller.data_mut().budget;
        if left >= 0 && budget.is_overdue() {
            budget.cut_slice(left);
            left = -1;
        }
        fuel.set(&mut *caller, Val::I64(left))?;
    }
    Ok(())
}

/// Waits for something outside, no longer than the cell may. `None`: the guest was asked to stop.
///
/// # Errors
///
/// [`Halt::HardStop`] when it had been asked before and the grace is over.
pub(crate) async fn wait_outside<F: Future>(
    caller: &mut Caller<'_, Guest>,
    outside: F,
) -> wasmtime::Result<Option<F::Output>> {
    let since = Instant::now();
    let guest = caller.data_mut();
    guest.budget.wait();
    let (deadline, verdict) = guest.budget.wait_deadline();
    let signal = Arc::clone(&guest.signal);
    let stopped = guest.budget.stopped_by().is_some();
    let computed = guest.budget.take_unbilled();
    let mut permit = guest.leave.take();
    if let Some(permit) = &mut permit {
        permit.pause(computed);
    }
    let result = tokio::select! {
        biased;
        output = outside => Ok(output),
        () = tokio::time::sleep_until(deadline.into()) => Err(verdict),
        () = signal.wait(), if !stopped => Err(Verdict::SoftStop(Limit::Interrupt)),
    };
    let waited = since.elapsed();
    if let Some(permit) = &mut permit {
        permit.resume().await;
    }
    caller.data().leave.set(permit);
    caller.data_mut().budget.resume_after_wait(waited);
    match result {
        Ok(output) => Ok(Some(output)),
        Err(Verdict::SoftStop(limit)) => {
            caller.data_mut().budget.note_stop(limit);
            soft_stop(caller, limit).await?;
            Ok(None)
        }
        Err(Verdict::HardStop | Verdict::Continue) => Err(Halt::HardStop.into()),
    }
}

/// `host.call(ptr, len, out_ptr_ptr, out_len_ptr) -> status`: the door.
async fn call(
    mut caller: Caller<'_, Guest>,
    ptr: u32,
    len: u32,
    out_ptr: u32,
    out_len: u32,
) -> wasmtime::Result<i32> {
    charge_call(&mut caller, len.into())?;
    let memory = caller.data().handles()?.memory;
    let memory = memory.data(&caller);
    let Some(bytes) = guest_slice(memory, ptr, len).filter(|bytes| bytes.len() <= CALL_BYTES_MAX)
    else {
        return Ok(CALL_FAULT);
    };
    let said = match Call::from_bytes(bytes) {
        Ok(Call::Message(message)) => text::collect(message, memory).map(Call::Message),
        said => said,
    };
    let said = match said {
        Err(error) => return Err(caller.data_mut().fault(error)),
        Ok(said) => said,
    };
    if let Call::Message(message) = &said {
        charge_call(&mut caller, message.body.len() as u64)?;
    }
    let guest = caller.data_mut();
    let mut reply = match guest.conversation.answer(said) {
        Err(error) => return Err(guest.fault(error)),
        Ok(Answer::Now(reply)) => reply,
        Ok(Answer::Later(outside)) => match wait_outside(&mut caller, outside).await? {
            Some(done) => caller.data_mut().conversation.finish(done),
            // The pending exception is raised before the guest can look at this.
            None => Message::new(serde_json::json!({ "error": "stopped" })),
        },
    };
    let sent = send(&mut caller, &mut reply).await;
    caller.data_mut().conversation.take_back(reply);
    match sent? {
        Some((address, len)) => write_result(&mut caller, out_ptr, out_len, address, len),
        None => Ok(CALL_FAULT),
    }
}

/// Sends a message, as a letter if that's possible; where the frame is, and its length. `None` when
/// the guest has no memory for it.
async fn send(
    caller: &mut Caller<'_, Guest>,
    message: &mut Message,
) -> wasmtime::Result<Option<(u32, usize)>> {
    let is_posted = match text::post(caller, message).await? {
        Post::Done => true,
        Post::Unsuitable => false,
        Post::Refused => return Ok(None),
    };
    let (head, body) = match is_posted {
        // The agent knows a letter without a header by its empty frame.
        true if message.header.is_empty() => (Cow::default(), [].as_slice()),
        true => (message.head(), [].as_slice()),
        false => (message.head(), message.body.as_slice()),
    };
    let len = head.len() + body.len();
    Ok(put(caller, &head, body).await?.map(|address| (address, len)))
}

/// Copies a message into a buffer that the guest allocates; `None` when it has no memory for it.
async fn put(
    caller: &mut Caller<'_, Guest>,
    head: &[u8],
    body: &[u8],
) -> wasmtime::Result<Option<u32>> {
    let len = head.len() + body.len();
    if len == 0 {
        return Ok(Some(0));
    }
    charge_call(caller, len as u64)?;
    let handles = Arc::clone(caller.data().handles()?);
    let address = if len > REPLY_BYTES_MAX {
        0
    } else {
        handles.host_alloc.call_async(&mut *caller, len as i32).await? as u32
    };
    let start = address as usize;
    // `host_alloc` is guest code: what it answers is checked like everything else.
    let target = handles.memory.data_mut(&mut *caller).get_mut(start..start.saturating_add(len));
    match target {
        Some(target) if address != 0 => {
            let (for_head, for_body) = target.split_at_mut(head.len());
            for_head.copy_from_slice(head);
            for_body.copy_from_slice(body);
            Ok(Some(address))
        }
        _ => {
            caller.data_mut().refused_bytes = Some(len);
            Ok(None)
        }
    }
}

fn write_result(
    caller: &mut Caller<'_, Guest>,
    out_ptr: u32,
    out_len: u32,
    address: u32,
    len: usize,
) -> wasmtime::Result<i32> {
    let memory = caller.data().handles()?.memory;
    let bytes = memory.data_mut(caller);
    let len = u32::try_from(len).expect("a reply is at most REPLY_BYTES_MAX long");
    let written = write_u32(bytes, out_ptr, address) && write_u32(bytes, out_len, len);
    Ok(if written { CALL_OK } else { CALL_FAULT })
}

/// The guest's bytes at `ptr`, if they all exist.
pub(crate) fn guest_slice(memory: &[u8], ptr: u32, len: u32) -> Option<&[u8]> {
    memory.get(ptr as usize..(ptr as usize).checked_add(len as usize)?)
}

/// A little-endian u32 of the guest.
pub(crate) fn read_u32(memory: &[u8], ptr: u32) -> Option<u32> {
    let bytes = guest_slice(memory, ptr, 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Writes a little-endian u32, if there is room for it.
pub(crate) fn write_u32(memory: &mut [u8], ptr: u32, value: u32) -> bool {
    match memory.get_mut(ptr as usize..(ptr as usize).saturating_add(4)) {
        Some(target) => {
            target.copy_from_slice(&value.to_le_bytes());
            true
        }
        None => false,
    }
}
