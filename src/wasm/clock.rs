//! Time as the guest sees it: a clock of the session's own, and sleeping.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wasmtime::{Caller, Result};
use wasmtime_wasi::p1::wasi_snapshot_preview1 as preview1;
use wasmtime_wasi::{HostMonotonicClock, HostWallClock};

use super::guest::{Guest, guest_slice, wait_outside, write_u32};
use super::wasi::{ERRNO_FAULT, ERRNO_INVAL, ERRNO_SUCCESS, parts};
use crate::policy::Clock;
use crate::snapshot::ClockRecord;

/// A clock of the session's own: see [`Clock::Fixed`].
#[derive(Debug)]
pub(crate) struct VirtualClock {
    start_ns: u64,
    elapsed_ns: AtomicU64,
}

/// What each reading of a [`VirtualClock`] adds, so that loops that wait for time to pass end.
const READING_NS: u64 = 1_000;

impl VirtualClock {
    /// The session's clock, if the policy wants one of its own.
    pub(crate) fn new(clock: Clock) -> Option<Arc<Self>> {
        match clock {
            Clock::Real => None,
            Clock::Fixed(start_ns) => Some(Self::resume(ClockRecord { start_ns, elapsed_ns: 0 })),
        }
    }

    /// The clock of a session that was saved.
    pub(crate) fn resume(record: ClockRecord) -> Arc<Self> {
        let ClockRecord { start_ns, elapsed_ns } = record;
        Arc::new(Self { start_ns, elapsed_ns: AtomicU64::new(elapsed_ns) })
    }

    /// What to resume from.
    pub(crate) fn record(&self) -> ClockRecord {
        let elapsed_ns = self.elapsed_ns.load(Ordering::Acquire);
        ClockRecord { start_ns: self.start_ns, elapsed_ns }
    }

    /// Goes to a time of this clock.
    pub(crate) fn go_to(&self, elapsed_ns: u64) {
        self.elapsed_ns.store(elapsed_ns, Ordering::Release);
    }

    fn advance(&self, ns: u64) -> u64 {
        let step = |now: u64| Some(now.saturating_add(ns));
        self.elapsed_ns.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).unwrap_or(u64::MAX)
    }
}

pub(super) struct VirtualWallClock(pub(super) Arc<VirtualClock>);

impl HostWallClock for VirtualWallClock {
    fn resolution(&self) -> Duration {
        Duration::from_nanos(READING_NS)
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.start_ns.saturating_add(self.0.advance(READING_NS)))
    }
}

pub(super) struct VirtualMonotonicClock(pub(super) Arc<VirtualClock>);

impl HostMonotonicClock for VirtualMonotonicClock {
    fn resolution(&self) -> u64 {
        READING_NS
    }

    fn now(&self) -> u64 {
        self.0.advance(READING_NS)
    }
}

/// Size of a subscription and of an event (`typenames.witx`), and offsets in them.
const SUBSCRIPTION_BYTES: usize = 48;
const EVENT_BYTES: usize = 32;
const SUBSCRIPTION_TAG: usize = 8;
const SUBSCRIPTION_CLOCK: usize = 16;
const SUBSCRIPTION_TIMEOUT: usize = 24;
const SUBSCRIPTION_FLAGS: usize = 40;
/// `subclockflags.subscription_clock_abstime`.
const FLAG_ABSTIME: u8 = 1;
/// Subscriptions that one poll may hold; wasmtime-wasi allocates for each.
const SUBSCRIPTIONS_MAX: u32 = 1024;

/// `poll_oneoff`, which is how Python sleeps: limits reach it, and a virtual clock doesn't wait.
///
/// A poll with a descriptor in it is left to wasmtime-wasi: files and streams are always ready, so
/// that it answers at once.
pub(super) async fn poll_oneoff(
    mut caller: Caller<'_, Guest>,
    subs: i32,
    events: i32,
    count: i32,
    out: i32,
) -> Result<i32> {
    if !(1..=SUBSCRIPTIONS_MAX).contains(&(count as u32)) {
        return Ok(ERRNO_INVAL);
    }
    let memory = caller.data().handles()?.memory;
    let length = count as u32 * SUBSCRIPTION_BYTES as u32;
    let Some(all) = guest_slice(memory.data(&caller), subs as u32, length).map(<[u8]>::to_vec)
    else {
        return Ok(ERRNO_FAULT);
    };
    let mut first: Option<(u64, &[u8])> = None;
    for subscription in all.chunks_exact(SUBSCRIPTION_BYTES) {
        if subscription[SUBSCRIPTION_TAG] != 0 {
            let (mut memory, guest) = parts(&mut caller)?;
            return preview1::poll_oneoff(&mut guest.wasi, &mut memory, subs, events, count, out)
                .await;
        }
        let Some(ns) = sleep_ns(&mut caller, subscription, events)? else { return Ok(ERRNO_INVAL) };
        if first.is_none_or(|(least, _)| ns < least) {
            first = Some((ns, subscription));
        }
    }
    let Some((ns, subscription)) = first else { return Ok(ERRNO_INVAL) };
    match caller.data().clock.clone() {
        Some(clock) => {
            clock.advance(ns);
        }
        None => {
            let sleep = tokio::time::sleep(Duration::from_nanos(ns));
            // Woken early by a stop, the sleep looks complete; the exception comes right after.
            wait_outside(&mut caller, sleep).await?;
        }
    }
    write_clock_event(&mut caller, subscription, events, out)
}

/// How long a clock subscription sleeps. `scratch` is where the guest expects events, free until
/// one is written. `None` for a clock that doesn't exist.
fn sleep_ns(
    caller: &mut Caller<'_, Guest>,
    subscription: &[u8],
    scratch: i32,
) -> Result<Option<u64>> {
    let word = |at: usize| subscription[at..at + 8].try_into().expect("eight bytes");
    let timeout = u64::from_le_bytes(word(SUBSCRIPTION_TIMEOUT));
    if subscription[SUBSCRIPTION_FLAGS] & FLAG_ABSTIME == 0 {
        return Ok(Some(timeout));
    }
    let clock = i32::from_le_bytes(
        subscription[SUBSCRIPTION_CLOCK..SUBSCRIPTION_CLOCK + 4].try_into().expect("four bytes"),
    );
    let (mut memory, guest) = parts(caller)?;
    let errno = preview1::clock_time_get(&mut guest.wasi, &mut memory, clock, 0, scratch)?;
    if errno != ERRNO_SUCCESS {
        return Ok(None);
    }
    let memory = caller.data().handles()?.memory;
    let now = guest_slice(memory.data(&*caller), scratch as u32, 8);
    let now = now.map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
    Ok(now.map(|now| timeout.saturating_sub(now)))
}

/// Writes the one event "the clock of this subscription has come".
fn write_clock_event(
    caller: &mut Caller<'_, Guest>,
    subscription: &[u8],
    events: i32,
    out: i32,
) -> Result<i32> {
    let memory = caller.data().handles()?.memory;
    let bytes = memory.data_mut(caller);
    let start = events as u32 as usize;
    let Some(event) = bytes.get_mut(start..start.saturating_add(EVENT_BYTES)) else {
        return Ok(ERRNO_FAULT);
    };
    event.fill(0);
    event[..8].copy_from_slice(&subscription[..8]);
    Ok(if write_u32(bytes, out as u32, 1) { ERRNO_SUCCESS } else { ERRNO_FAULT })
}
