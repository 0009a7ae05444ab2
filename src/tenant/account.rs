//! The books of one tenant: what it may have, what it has, and who of it waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::bucket::Bucket;
use super::gate::Gate;
use super::line::{Counter, Line, Place};
use super::quotas::{Quotas, Refusals, TenantUsage};
use crate::error::{Error, Result};
use crate::lm::{ModelUsage, UsageSummary};

/// More than a session can have, and little enough that a sum over a million doesn't overflow.
const SESSION_BYTES_MAX: u64 = 1 << 40;

/// What all tenants of a process share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) gate: Gate,
    /// Living tenants by name.
    pub(super) names: Mutex<BTreeMap<String, Weak<Account>>>,
}

impl Shared {
    pub(super) fn names(&self) -> MutexGuard<'_, BTreeMap<String, Weak<Account>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One tenant. Handles, sessions and cells keep it alive.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) shared: Arc<Shared>,
    pub(super) lane: u64,
    /// Nanoseconds that its guests computed.
    compute: Arc<AtomicU64>,
    /// As long as `compute` is below it, the bucket need not be asked.
    ceiling: AtomicU64,
    /// Nanoseconds that its cells waited.
    delayed: AtomicU64,
    books: Mutex<Books>,
    quotas_changed: Notify,
}

#[derive(Debug)]
struct Books {
    quotas: Quotas,
    sessions: u32,
    memory_bytes: u64,
    memory_bytes_peak: u64,
    /// Cells that count into [`Quotas::cells`]: those that run, and those that wait for the bucket.
    slots: u32,
    running: u32,
    waiting: u32,
    cells: u64,
    for_slot: Line,
    lm_calls: u64,
    lm_usage: UsageSummary,
    prompts: u32,
    for_prompt: Line,
    refused: Refusals,
    bucket: Bucket,
}

impl Books {
    /// Gives free slots to those who wait.
    fn serve_slots(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        while self.slots < self.quotas.cells
            && let Some((_, waker)) = self.for_slot.pop()
        {
            self.slots += 1;
            wakers.extend(waker);
        }
        wakers
    }

    /// Lets as many of those who wait send a prompt as there is room for.
    fn serve_prompts(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        while self.prompts < self.quotas.lm_concurrency
            && let Some((_, waker)) = self.for_prompt.pop()
        {
            self.prompts += 1;
            wakers.extend(waker);
        }
        wakers
    }
}

/// How a cell that wants to begin starts out.
pub(super) enum Admission<'a> {
    /// It begins.
    Begun(Slot),
    /// It waits: for a slot if it has none, and for the bucket.
    Queued { queued: Queued<'a>, slot: Result<Slot, Place<ForSlot<'a>>>, longest: Duration },
}

impl Account {
    pub(super) fn new(name: String, quotas: Quotas, shared: Arc<Shared>) -> Self {
        let compute = Arc::new(AtomicU64::new(0));
        let lane = shared.gate.open_lane(Arc::clone(&compute));
        let bucket = Bucket::new(quotas.compute_per_second);
        let ceiling = AtomicU64::new(bucket.left().max(0).unsigned_abs());
        let books = Mutex::new(Books {
            quotas,
            sessions: 0,
            memory_bytes: 0,
            memory_bytes_peak: 0,
            slots: 0,
            running: 0,
            waiting: 0,
            cells: 0,
            for_slot: Line::default(),
            lm_calls: 0,
            lm_usage: UsageSummary::default(),
            prompts: 0,
            for_prompt: Line::default(),
            refused: Refusals::default(),
            bucket,
        });
        let (delayed, quotas_changed) = (AtomicU64::new(0), Notify::new());
        Self { name, shared, lane, compute, ceiling, delayed, books, quotas_changed }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, quota: &'static str, reason: String) -> Error {
        Error::Quota { tenant: self.name.clone(), quota, reason }
    }

    pub(super) fn quotas(&self) -> Quotas {
        self.books().quotas.clone()
    }

    pub(super) fn set_quotas(&self, quotas: Quotas) {
        let mut books = self.books();
        self.settle(&mut books);
        books.bucket.set_rate(quotas.compute_per_second);
        books.quotas = quotas;
        self.settle(&mut books);
        let slots = books.serve_slots();
        let prompts = books.serve_prompts();
        drop(books);
        slots.into_iter().chain(prompts).for_each(Waker::wake);
        self.quotas_changed.notify_waiters();
    }

    pub(super) fn usage(&self) -> TenantUsage {
        let books = self.books();
        TenantUsage {
            name: self.name.clone(),
            sessions: books.sessions,
            memory_bytes: books.memory_bytes,
            memory_bytes_peak: books.memory_bytes_peak,
            cells_running: books.running,
            cells_waiting: books.waiting,
            cells: books.cells,
            compute: Duration::from_nanos(self.compute.load(Ordering::Relaxed)),
            delayed: Duration::from_nanos(self.delayed.load(Ordering::Relaxed)),
            lm_calls: books.lm_calls,
            lm_usage: books.lm_usage.clone(),
            refused: books.refused,
        }
    }

    pub(super) fn open_session(&self) -> Result<()> {
        let mut books = self.books();
        if books.sessions >= books.quotas.sessions {
            books.refused.sessions += 1;
            let reason = format!("{} sessions are open; close one first", books.sessions);
            return Err(self.refuse("sessions", reason));
        }
        books.sessions += 1;
        Ok(())
    }

    pub(super) fn close_session(&self, memory_bytes: u64) {
        let mut books = self.books();
        books.sessions -= 1;
        books.memory_bytes -= memory_bytes;
    }

    /// Adds to the memory of a session, which has `own` bytes; `false`: the quota has no room for it.
    pub(super) fn grow(&self, own: &AtomicU64, bytes: u64) -> bool {
        let mut books = self.books();
        let after = books.memory_bytes.saturating_add(bytes);
        if after > books.quotas.memory_bytes {
            books.refused.memory_bytes += 1;
            return false;
        }
        own.fetch_add(bytes, Ordering::Relaxed);
        books.memory_bytes = after;
        books.memory_bytes_peak = books.memory_bytes_peak.max(after);
        true
    }

    /// Replaces what is on record for a session, which has `own` bytes.
    pub(super) fn set_memory(&self, own: &AtomicU64, bytes: u64) {
        let mut books = self.books();
        let bytes = bytes.min(SESSION_BYTES_MAX);
        let before = own.swap(bytes, Ordering::Relaxed);
        books.memory_bytes = books.memory_bytes - before + bytes;
        books.memory_bytes_peak = books.memory_bytes_peak.max(books.memory_bytes);
    }

    /// A tenant above its quota of memory starts no cell.
    fn check_memory(&self, books: &mut Books) -> Result<()> {
        let (bytes, quota) = (books.memory_bytes, books.quotas.memory_bytes);
        if bytes <= quota {
            return Ok(());
        }
        books.refused.memory_bytes += 1;
        let reason = format!("its sessions hold {bytes} bytes of {quota}; reset or close some");
        Err(self.refuse("memory_bytes", reason))
    }

    /// A cell begins within another one of the tenant, which waits for it and has a slot. Were it to
    /// wait for one of its own, both could wait for ever.
    pub(super) fn begin_nested(self: &Arc<Self>) -> Result<Slot> {
        let mut books = self.books();
        self.check_memory(&mut books)?;
        books.running += 1;
        books.cells += 1;
        Ok(Slot { account: Arc::clone(self), nested: true, running: true })
    }

    /// A cell wants to begin.
    pub(super) fn ask(self: &Arc<Self>) -> Result<Admission<'_>> {
        let mut books = self.books();
        self.check_memory(&mut books)?;
        let slot = books.slots < books.quotas.cells && books.for_slot.is_empty();
        if slot && (!self.is_over() || self.settle(&mut books) > 0) {
            books.slots += 1;
            books.running += 1;
            books.cells += 1;
            let account = Arc::clone(self);
            return Ok(Admission::Begun(Slot { account, nested: false, running: true }));
        }
        if books.waiting >= books.quotas.queue {
            books.refused.queue += 1;
            let (running, waiting) = (books.running, books.waiting);
            let reason = format!("{running} cells run and {waiting} wait; ask again later");
            return Err(self.refuse("queue", reason));
        }
        books.waiting += 1;
        let slot = if slot {
            // The slot is taken at once: it's the bucket that this cell waits for.
            books.slots += 1;
            Ok(Slot::of(self))
        } else {
            Err(Place::new(ForSlot(self), books.for_slot.join()))
        };
        let longest = books.quotas.queue_wait;
        drop(books);
        Ok(Admission::Queued { queued: Queued { delay: self.delay() }, slot, longest })
    }

    pub(super) fn waited_too_long(&self, longest: Duration) -> Error {
        self.books().refused.queue_wait += 1;
        self.refuse("queue_wait", format!("the cell waited {longest:?}; ask again later"))
    }

    fn free_slot(&self) {
        let mut books = self.books();
        books.slots -= 1;
        let wakers = books.serve_slots();
        drop(books);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Adds processor time; `true`: the bucket has to be asked before the guest goes on.
    pub(super) fn charge(&self, computed: Duration) -> bool {
        let nanos = u64::try_from(computed.as_nanos()).unwrap_or(u64::MAX);
        self.compute.fetch_add(nanos, Ordering::Relaxed);
        self.is_over()
    }

    /// Whether the bucket has to be asked.
    pub(super) fn is_over(&self) -> bool {
        self.compute.load(Ordering::Relaxed) >= self.ceiling.load(Ordering::Relaxed)
    }

    /// Whether the tenant has outspent its processor time.
    pub(super) fn is_in_debt(&self) -> bool {
        self.settle(&mut self.books()) <= 0
    }

    /// Brings the bucket up to date; what's left in it is the answer.
    fn settle(&self, books: &mut Books) -> i64 {
        let total = self.compute.load(Ordering::Relaxed);
        let left = books.bucket.settle(total);
        self.ceiling.store(total + left.max(0).unsigned_abs(), Ordering::Relaxed);
        left
    }

    /// Sleeps until the tenant is out of debt. The answer is what is reserved for the guest's next
    /// slice, to be given back when it's charged.
    pub(super) async fn earn(&self, slice: Duration) -> Reservation<'_> {
        loop {
            let mut changed = std::pin::pin!(self.quotas_changed.notified());
            // Listens before it looks, so that no change falls between the two.
            changed.as_mut().enable();
            let Some((reservation, wait)) = self.reserve(slice) else {
                return Reservation { account: self, nanos: 0 };
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => return reservation,
                () = changed => {}
            }
        }
    }

    /// A slice of a tenant in debt, and how long it takes until it's paid for; `None`: no debt.
    fn reserve(&self, slice: Duration) -> Option<(Reservation<'_>, Duration)> {
        let mut books = self.books();
        if self.settle(&mut books) > 0 {
            return None;
        }
        let wait = books.bucket.wait();
        let nanos = i64::try_from(slice.as_nanos()).unwrap_or(i64::MAX);
        books.bucket.reserve(nanos);
        Some((Reservation { account: self, nanos }, wait))
    }

    pub(super) fn give_back(&self, reserved: i64) {
        if reserved > 0 {
            let mut books = self.books();
            books.bucket.give_back(reserved);
            self.settle(&mut books);
        }
    }

    /// Counts prompts, all or none.
    pub(super) fn count_lm_calls(&self, count: u32) -> Result<()> {
        let mut books = self.books();
        let (before, quota) = (books.lm_calls, books.quotas.lm_calls);
        let after = before.saturating_add(count.into());
        if after > quota {
            books.refused.lm_calls += u64::from(count);
            return Err(self.refuse("lm_calls", format!("{before} + {count} > {quota}")));
        }
        books.lm_calls = after;
        Ok(())
    }

    /// Counts what calls cost.
    pub(super) fn book(&self, usage: &[ModelUsage]) {
        self.books().lm_usage.add(usage);
    }

    /// Room for a prompt; `None`: it's there.
    pub(super) fn ask_prompt(&self) -> Option<Place<ForPrompt<'_>>> {
        let mut books = self.books();
        if books.prompts < books.quotas.lm_concurrency && books.for_prompt.is_empty() {
            books.prompts += 1;
            return None;
        }
        Some(Place::new(ForPrompt(self), books.for_prompt.join()))
    }

    /// Room for up to so many more prompts, as far as nobody else waits for it.
    pub(super) fn more_prompts(&self, most: u32) -> u32 {
        let mut books = self.books();
        let free = books.quotas.lm_concurrency.saturating_sub(books.prompts);
        let more = free.min(most);
        books.prompts += more;
        more
    }

    pub(super) fn end_prompts(&self, count: u32) {
        let mut books = self.books();
        books.prompts -= count;
        let wakers = books.serve_prompts();
        drop(books);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Counts the time until the answer is dropped as delay of a cell.
    pub(super) fn delay(&self) -> Delay<'_> {
        Delay { account: self, since: Instant::now() }
    }

    /// `(slots, in line for one, prompts, in line for one, reserved compute)`
    #[cfg(test)]
    pub(super) fn census(&self) -> (u32, usize, u32, usize, i64) {
        let books = self.books();
        let reserved = books.bucket.reserved();
        (books.slots, books.for_slot.len(), books.prompts, books.for_prompt.len(), reserved)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.shared.gate.close_lane(self.lane);
        let mut names = self.shared.names();
        // Another tenant may have the name by now.
        if names.get(&self.name).is_some_and(|account| std::ptr::eq(account.as_ptr(), self)) {
            names.remove(&self.name);
        }
    }
}

/// Time that a cell waits.
pub(super) struct Delay<'a> {
    account: &'a Account,
    since: Instant,
}

impl Drop for Delay<'_> {
    fn drop(&mut self) {
        let nanos = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.account.delayed.fetch_add(nanos, Ordering::Relaxed);
    }
}

/// A cell that waits to begin.
pub(super) struct Queued<'a> {
    delay: Delay<'a>,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.delay.account.books().waiting -= 1;
    }
}

/// One of the tenant's [`Quotas::cells`], or a part of one that another cell has.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) account: Arc<Account>,
    nested: bool,
    running: bool,
}

impl Slot {
    /// A slot that is already counted, for a cell that hasn't begun.
    pub(super) fn of(account: &Arc<Account>) -> Self {
        Self { account: Arc::clone(account), nested: false, running: false }
    }

    /// The cell begins.
    pub(super) fn begin(&mut self) {
        let mut books = self.account.books();
        books.running += 1;
        books.cells += 1;
        self.running = true;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.running {
            self.account.books().running -= 1;
        }
        if !self.nested {
            self.account.free_slot();
        }
    }
}

/// Processor time that is set aside for a guest's next slice.
pub(super) struct Reservation<'a> {
    account: &'a Account,
    nanos: i64,
}

impl Reservation<'_> {
    /// Lets it last until it's given back by hand.
    pub(super) fn keep(mut self) -> i64 {
        std::mem::take(&mut self.nanos)
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.account.give_back(self.nanos);
    }
}

/// Waiting for one of the tenant's cells to end.
pub(super) struct ForSlot<'a>(&'a Account);

impl Counter for ForSlot<'_> {
    fn poll_place(&self, number: u64, waker: &Waker) -> bool {
        let waker = waker.clone();
        let mut books = self.0.books();
        let before = books.for_slot.register(number, waker);
        drop(books);
        before.is_err()
    }

    fn give_up(&self, number: u64) {
        let left = self.0.books().for_slot.leave(number);
        if left.is_none() {
            self.0.free_slot();
        }
    }
}

/// Waiting for one of the tenant's prompts to be answered.
pub(super) struct ForPrompt<'a>(&'a Account);

impl Counter for ForPrompt<'_> {
    fn poll_place(&self, number: u64, waker: &Waker) -> bool {
        let waker = waker.clone();
        let mut books = self.0.books();
        let before = books.for_prompt.register(number, waker);
        drop(books);
        before.is_err()
    }

    fn give_up(&self, number: u64) {
        let left = self.0.books().for_prompt.leave(number);
        if left.is_none() {
            self.0.end_prompts(1);
        }
    }
}
