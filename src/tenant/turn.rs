//! What a session and a running cell hold of their tenant.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::account::{Account, Admission, Slot};
use crate::error::Result;
use crate::lm::ModelUsage;

/// What a guest's next slice is thought to take, when its tenant is in debt: as much as the last, but
/// within these. The lower one also stands for a cell that has not begun.
const SLICE_MIN: Duration = Duration::from_micros(200);
const SLICE_MAX: Duration = Duration::from_millis(3);

/// A session's part of its tenant. Dropped, it gives the session and its memory back.
#[derive(Debug)]
pub(crate) struct Seat {
    account: Arc<Account>,
    memory_bytes: AtomicU64,
    /// Whether its cells run while another of the tenant waits for them.
    nested: bool,
}

/// Whose something is, while the tenant lives and after.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owner(Weak<Account>);

impl Owner {
    /// Whether both are the same tenant, or nobody.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0.ptr_eq(&other.0)
    }
}

impl Seat {
    /// The tenant.
    pub(crate) fn owner(&self) -> Owner {
        Owner(Arc::downgrade(&self.account))
    }

    /// # Errors
    ///
    /// [`Error::Quota`](crate::Error::Quota) when the tenant has all its sessions.
    pub(super) fn open(account: &Arc<Account>, nested: bool) -> Result<Self> {
        account.open_session()?;
        Ok(Self { account: Arc::clone(account), memory_bytes: AtomicU64::new(0), nested })
    }

    /// Asks for more memory; `false`: the tenant has no room for it, and nothing changed.
    pub(crate) fn grow(&self, bytes: u64) -> bool {
        self.account.grow(&self.memory_bytes, bytes)
    }

    /// Sets the session's memory to what it was found to be, be it above the quota: then the
    /// tenant's next cell is refused.
    pub(crate) fn set_memory(&self, bytes: u64) {
        self.account.set_memory(&self.memory_bytes, bytes);
    }

    /// The session's memory, as it was last set, and what it has grown by since.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes.load(Ordering::Relaxed)
    }

    /// Waits until a cell may begin, and until it has a processor. May be dropped at any time. A
    /// nested one doesn't wait in the queue; a debt of the tenant is slept off as in its middle.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`](crate::Error::Quota) when the tenant's memory is above its quota, or the
    /// queue is full, or the cell has been in it for too long. Waiting for a processor is no part of
    /// that: everybody's turn comes.
    pub(crate) async fn admit(&self) -> Result<Turn> {
        let account = &self.account;
        if self.nested {
            let mut turn = Turn { slot: account.begin_nested()?, holds: false, reserved: 0 };
            turn.resume().await;
            return Ok(turn);
        }
        let mut reserved = 0;
        let slot = match account.ask()? {
            Admission::Begun(slot) => slot,
            Admission::Queued { queued, slot, longest } => {
                // On the heap, because few cells come this way.
                let begins = Box::pin(async {
                    let slot = match slot {
                        Ok(slot) => slot,
                        Err(place) => {
                            place.await;
                            Slot::of(account)
                        }
                    };
                    (slot, account.earn(SLICE_MIN).await)
                });
                let begun = tokio::time::timeout(longest, begins).await;
                let (mut slot, reservation) =
                    begun.map_err(|_| account.waited_too_long(longest))?;
                drop(queued);
                slot.begin();
                reserved = reservation.keep();
                slot
            }
        };
        let mut turn = Turn { slot, holds: false, reserved };
        turn.enter().await;
        Ok(turn)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.account.close_session(self.memory_bytes.load(Ordering::Relaxed));
    }
}

/// A cell that has begun. Between [`admit`](Seat::admit) or [`resume`](Self::resume) and
/// [`pause`](Self::pause) or drop it holds a processor. If one of its futures is dropped, the
/// processor may be gone; the next `slice_end` or `resume` gets one again. A future that is kept but
/// not polled keeps its processor, as it would keep any lock: embedders run cells in tasks.
#[derive(Debug)]
pub(crate) struct Turn {
    slot: Slot,
    /// Whether it holds a processor.
    holds: bool,
    /// Nanoseconds that the tenant's bucket has set aside for this guest's next slice.
    reserved: i64,
}

impl Turn {
    /// The guest has computed for so long and would go on: lets others have their turn. A tenant
    /// that has outspent its processor time sleeps here, without a processor.
    pub(crate) async fn slice_end(&mut self, computed: Duration) {
        self.slot.account.shared.gate.note_slice();
        if self.charge(computed) && self.slot.account.is_in_debt() {
            // On the heap, so that the usual way stays small.
            return Box::pin(self.sleep_off(computed)).await;
        }
        // First of all the executor: whoever it wakes here can still be next.
        tokio::task::yield_now().await;
        let (account, gate) = (&self.slot.account, &self.slot.account.shared.gate);
        if !self.holds {
            return self.enter().await;
        }
        if gate.is_wanted()
            && let Some(place) = gate.hand_over(account.lane)
        {
            self.holds = false;
            let _delay = account.delay();
            place.await;
            self.holds = true;
        }
    }

    /// The guest has computed for so long and waits for something outside: gives its processor up.
    pub(crate) fn pause(&mut self, computed: Duration) {
        self.charge(computed);
        self.release();
    }

    /// The wait is over: the guest gets a processor when it's its turn.
    pub(crate) async fn resume(&mut self) {
        // A guest that never ends a slice, because it waits so often, pays here.
        let account = &self.slot.account;
        if account.is_over() && account.is_in_debt() {
            return Box::pin(self.sleep_off(Duration::ZERO)).await;
        }
        self.enter().await;
    }

    /// The cell is over, after the guest has computed for so long.
    pub(crate) fn finish(mut self, computed: Duration) {
        self.pause(computed);
    }

    /// Whether slices should be about 0.2 ms instead of 1 ms: guests of more than one tenant compute
    /// or wait, or did so within the last two seconds of compute.
    pub(crate) fn is_contended(&self) -> bool {
        self.slot.account.shared.gate.is_contended()
    }

    /// The tenant's quotas of LM calls, for whoever makes them.
    pub(crate) fn lm(&self) -> LmQuota {
        LmQuota { account: Arc::clone(&self.slot.account) }
    }

    /// Adds what was computed to the bill; `true`: the bucket has to be asked.
    fn charge(&mut self, computed: Duration) -> bool {
        let over = self.slot.account.charge(computed);
        let reserved = std::mem::take(&mut self.reserved);
        if reserved == 0 {
            return over;
        }
        self.slot.account.give_back(reserved);
        self.slot.account.is_over()
    }

    fn release(&mut self) {
        if std::mem::take(&mut self.holds) {
            let account = &self.slot.account;
            account.shared.gate.leave(account.lane);
        }
    }

    /// Gets a processor, if it has none.
    async fn enter(&mut self) {
        if self.holds {
            return;
        }
        let account = &self.slot.account;
        if let Some(place) = account.shared.gate.enter(account.lane) {
            let _delay = account.delay();
            place.await;
        }
        self.holds = true;
    }

    /// Sleeps until the tenant has paid its debt, and gets a processor.
    async fn sleep_off(&mut self, computed: Duration) {
        self.release();
        let account = &self.slot.account;
        let delay = account.delay();
        let reservation = account.earn(computed.clamp(SLICE_MIN, SLICE_MAX)).await;
        drop(delay);
        self.reserved += reservation.keep();
        self.enter().await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.release();
        self.slot.account.give_back(self.reserved);
    }
}

/// A tenant's quotas of LM calls. Cheap to clone, may be used outside the cell.
#[derive(Debug, Clone)]
pub(crate) struct LmQuota {
    account: Arc<Account>,
}

impl LmQuota {
    pub(super) fn of(account: &Arc<Account>) -> Self {
        Self { account: Arc::clone(account) }
    }

    /// Counts prompts that are going to be sent, all or none.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`](crate::Error::Quota) when the tenant has not so many left.
    pub(crate) fn calls(&self, count: u32) -> Result<()> {
        self.account.count_lm_calls(count)
    }

    /// Counts what calls cost.
    pub(crate) fn book(&self, usage: &[ModelUsage]) {
        self.account.book(usage);
    }

    /// Waits until the tenant may have another prompt in flight; the answer is leave for as many of
    /// `most` as there is room for, at least one. May be dropped at any time.
    ///
    /// Not all at once, so that a batch can't wait for ever for more than there will ever be.
    pub(crate) async fn permits(&self, most: u32) -> LmPermits {
        if let Some(place) = self.account.ask_prompt() {
            place.await;
        }
        let count = 1 + self.account.more_prompts(most.saturating_sub(1));
        LmPermits { account: Arc::clone(&self.account), count }
    }
}

/// Leave to have prompts in flight, until it's dropped.
#[derive(Debug)]
pub(crate) struct LmPermits {
    account: Arc<Account>,
    count: u32,
}

impl LmPermits {
    /// How many at once.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }
}

impl Drop for LmPermits {
    fn drop(&mut self) {
        self.account.end_prompts(self.count);
    }
}
