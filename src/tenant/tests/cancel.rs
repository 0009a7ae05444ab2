//! Futures dropped anywhere: nothing is lost, and nobody is left waiting.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{MS, assert_idle, poll};
use crate::tenant::{Quotas, Seat, Tenant, Tenants, Turn};

/// A sequence of numbers that looks random: xorshift.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

async fn use_lm(turn: &mut Turn, dice: &mut Dice) {
    turn.pause(Duration::from_micros(dice.roll(100)));
    let permits = turn.lm().permits(1 + dice.roll(4) as u32).await;
    tokio::task::yield_now().await;
    drop(permits);
    turn.resume().await;
}

/// A guest that does whatever the dice say, for as long as they say.
async fn guest(seat: Arc<Seat>, seed: u64) -> Option<()> {
    let mut dice = Dice(seed);
    let mut turn = seat.admit().await.ok()?;
    while dice.roll(20) > 0 {
        match dice.roll(8) {
            0 => use_lm(&mut turn, &mut dice).await,
            1 => turn.pause(Duration::ZERO),
            2 => turn.resume().await,
            3 => drop(seat.grow(dice.roll(1000))),
            4 => seat.set_memory(dice.roll(1000)),
            // A future of the turn is dropped, and the turn goes on.
            5 => drop(poll(Box::pin(turn.slice_end(MS)).as_mut())),
            6 => drop(poll(Box::pin(turn.resume()).as_mut())),
            _ => turn.slice_end(Duration::from_micros(dice.roll(2000))).await,
        }
    }
    if dice.roll(2) == 0 {
        turn.finish(Duration::from_micros(dice.roll(500)));
    }
    Some(())
}

fn some_tenants(processors: usize) -> (Tenants, Vec<Tenant>) {
    let tenants = Tenants::new(processors);
    let quotas = |cells, rate| Quotas {
        cells,
        queue: 10,
        queue_wait: 40 * MS,
        memory_bytes: 20_000,
        compute_per_second: rate,
        lm_concurrency: 2,
        ..Quotas::default()
    };
    let all = [(3, 50 * MS), (10, 1000 * MS), (100, Duration::from_secs(1000))]
        .iter()
        .enumerate()
        .map(|(n, (cells, rate))| tenants.tenant(&format!("t{n}"), quotas(*cells, *rate)).unwrap())
        .collect();
    (tenants, all)
}

#[tokio::test(start_paused = true)]
async fn guests_dropped_at_random_leave_nothing_behind() {
    let mut progress = 0;
    for seed in 1..=20_u64 {
        let processors = 1 + seed as usize % 3;
        let (tenants, all) = some_tenants(processors);
        let seats: Vec<_> =
            all.iter().map(|tenant| Arc::new(tenant.open_session().unwrap())).collect();
        let mut dice = Dice(seed * 0x9E37_79B9);
        let mut guests: Vec<Pin<Box<dyn Future<Output = Option<()>>>>> = Vec::new();
        for _ in 0..10_000 {
            let at = dice.roll(guests.len() as u64 + 1) as usize;
            match dice.roll(10) {
                0 | 1 => {
                    let seat = Arc::clone(&seats[dice.roll(3) as usize]);
                    guests.push(Box::pin(guest(seat, dice.roll(u64::MAX) + 1)));
                }
                2 if at < guests.len() && dice.roll(2) == 0 => drop(guests.swap_remove(at)),
                3 => tokio::time::advance(Duration::from_micros(dice.roll(3000))).await,
                4 if dice.roll(20) == 0 => {
                    let tenant = &all[dice.roll(3) as usize];
                    let cells = 1 + dice.roll(20) as u32;
                    tenant.set_quotas(Quotas { cells, ..tenant.quotas() }).unwrap();
                }
                _ if at < guests.len() => {
                    if let std::task::Poll::Ready(done) = poll(guests[at].as_mut()) {
                        progress += u64::from(done.is_some());
                        drop(guests.swap_remove(at));
                    }
                }
                _ => {}
            }
        }
        // Whoever is left gets to its end: nobody waits for what nobody holds.
        for _ in 0..20_000 {
            guests.retain_mut(|guest| poll(guest.as_mut()).is_pending());
            if guests.is_empty() {
                break;
            }
            tokio::time::advance(5 * MS).await;
        }
        assert!(guests.is_empty(), "seed {seed}: {} wait for ever", guests.len());
        drop(seats);
        assert_idle(&tenants, processors);
    }
    assert!(progress > 200, "{progress}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tasks_aborted_at_random_leave_nothing_behind() {
    let (tenants, all) = some_tenants(2);
    let done = Arc::new(AtomicU64::new(0));
    let mut dice = Dice(7);
    for _ in 0..20 {
        let mut tasks = Vec::new();
        for _ in 0..200 {
            let seat = all[dice.roll(3) as usize].open_session().unwrap();
            let (done, seed) = (Arc::clone(&done), dice.roll(u64::MAX) + 1);
            tasks.push(tokio::spawn(async move {
                if guest(Arc::new(seat), seed).await.is_some() {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        tokio::time::sleep(Duration::from_micros(dice.roll(3000))).await;
        for task in &tasks {
            if dice.roll(2) == 0 {
                task.abort();
            }
        }
        for task in tasks {
            let ended = tokio::time::timeout(Duration::from_secs(60), task).await;
            assert!(ended.is_ok(), "a guest waits for ever");
        }
        assert_idle(&tenants, 2);
    }
    assert!(done.load(Ordering::Relaxed) > 100, "{done:?}");
}

/// What a future gives that has nothing to wait for any more.
fn served<F: Future>(mut future: Pin<Box<F>>) -> F::Output {
    match poll(future.as_mut()) {
        std::task::Poll::Ready(output) => output,
        std::task::Poll::Pending => panic!("it waits for what nobody holds"),
    }
}

#[tokio::test]
async fn what_was_granted_and_dropped_is_passed_on() {
    let tenants = Tenants::new(1);
    let quotas = Quotas { cells: 3, lm_concurrency: 1, ..Quotas::default() };
    let tenant = tenants.tenant("a", quotas).unwrap();
    let seat = tenant.open_session().unwrap();

    let holder = seat.admit().await.unwrap();
    let mut granted = Box::pin(seat.admit());
    let mut next = Box::pin(seat.admit());
    assert!(poll(granted.as_mut()).is_pending() && poll(next.as_mut()).is_pending());
    // The fourth and fifth cell wait for a slot, not for the processor.
    let mut slot = Box::pin(seat.admit());
    let mut last = Box::pin(seat.admit());
    assert!(poll(slot.as_mut()).is_pending() && poll(last.as_mut()).is_pending());
    drop(holder);
    drop(granted);
    drop(slot);
    let next = served(next).unwrap();
    let lm = next.lm();
    drop(next);
    drop(served(last).unwrap());

    let holder = lm.permits(1).await;
    let (mut granted, mut next) = (Box::pin(lm.permits(1)), Box::pin(lm.permits(1)));
    assert!(poll(granted.as_mut()).is_pending() && poll(next.as_mut()).is_pending());
    drop(holder);
    drop(granted);
    drop(served(next));
    drop(seat);
    assert_idle(&tenants, 1);
}
