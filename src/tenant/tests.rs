//! Quotas and usage, one by one. Times are virtual wherever the clock is paused.

mod cancel;
mod fairness;
mod measure;

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::{Quotas, Seat, Tenant, Tenants, Turn};
use crate::error::Error;

const MS: Duration = Duration::from_millis(1);
const NONE: Duration = Duration::ZERO;

fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn quota_of<T: std::fmt::Debug>(result: Result<T, Error>) -> &'static str {
    match result {
        Err(Error::Quota { quota, .. }) => quota,
        other => panic!("not refused by a quota: {other:?}"),
    }
}

fn tenant(processors: usize, quotas: Quotas) -> (Tenants, Tenant) {
    let tenants = Tenants::new(processors);
    let tenant = tenants.tenant("a", quotas).unwrap();
    (tenants, tenant)
}

/// Nothing is held and nobody waits.
fn assert_idle(tenants: &Tenants, processors: usize) {
    assert_eq!(tenants.shared.gate.census(), (processors, 0, 0, 0));
    let accounts: Vec<_> =
        tenants.shared.names().values().filter_map(std::sync::Weak::upgrade).collect();
    for account in accounts {
        assert_eq!(account.census(), (0, 0, 0, 0, 0), "{}", account.name);
        let usage = account.usage();
        assert_eq!(
            (usage.sessions, usage.memory_bytes, usage.cells_running, usage.cells_waiting),
            (0, 0, 0, 0),
            "{usage:?}"
        );
    }
}

#[test]
fn quotas_name_the_field_that_is_out_of_range() {
    let bad = [
        ("quotas.sessions", Quotas { sessions: 0, ..Quotas::default() }),
        ("quotas.memory_bytes", Quotas { memory_bytes: u64::MAX, ..Quotas::default() }),
        ("quotas.cells", Quotas { cells: 0, ..Quotas::default() }),
        ("quotas.queue", Quotas { queue: u32::MAX, ..Quotas::default() }),
        ("quotas.queue_wait", Quotas { queue_wait: Duration::MAX, ..Quotas::default() }),
        ("quotas.compute_per_second", Quotas { compute_per_second: NONE, ..Quotas::default() }),
        ("quotas.lm_calls", Quotas { lm_calls: u64::MAX, ..Quotas::default() }),
        ("quotas.lm_concurrency", Quotas { lm_concurrency: 0, ..Quotas::default() }),
    ];
    let (tenants, good) = tenant(1, Quotas::default());
    for (field, quotas) in bad {
        for result in [
            quotas.validate(),
            good.set_quotas(quotas.clone()),
            tenants.tenant("bad", quotas).map(drop),
        ] {
            match result {
                Err(Error::Invalid { what, .. }) => assert_eq!(what, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
    assert_eq!(good.quotas(), Quotas::default());
}

#[test]
fn names_are_bounded_and_unique_among_the_living() {
    let (tenants, first) = tenant(1, Quotas::default());
    let long = "x".repeat(129);
    for name in ["", "a\n", long.as_str(), "a", "default"] {
        let result = tenants.tenant(name, Quotas::default());
        assert!(matches!(result, Err(Error::Invalid { .. })), "{name:?}");
    }
    let names = |tenants: &Tenants| -> Vec<String> {
        tenants.usage().into_iter().map(|usage| usage.name).collect()
    };
    let other = tenants.tenant("B", Quotas::default()).unwrap();
    assert_eq!(names(&tenants), ["B", "a", "default"]);
    let seat = other.open_session().unwrap();
    drop(other);
    assert_eq!(names(&tenants), ["B", "a", "default"], "a session keeps its tenant");
    drop(seat);
    drop(first);
    assert_eq!(names(&tenants), ["default"]);
    let again = tenants.tenant("a", Quotas::default()).unwrap();
    assert_eq!(again.usage().cells, 0);
    assert_eq!(tenants.default_tenant().name(), "default");
}

#[test]
fn sessions_are_refused_until_one_is_closed() {
    let (tenants, tenant) = tenant(1, Quotas { sessions: 2, ..Quotas::default() });
    let first = tenant.open_session().unwrap();
    let _second = tenant.open_session().unwrap();
    let refused = tenant.open_session().unwrap_err();
    assert_eq!(
        refused.to_string(),
        "tenant `a` is over its quota of sessions: 2 sessions are open; close one first"
    );
    drop(first);
    let third = tenant.open_session().unwrap();
    tenant.set_quotas(Quotas { sessions: 3, ..tenant.quotas() }).unwrap();
    let fourth = tenant.open_session().unwrap();
    assert_eq!((tenant.usage().sessions, tenant.usage().refused.sessions), (3, 1));
    drop((_second, third, fourth));
    assert_idle(&tenants, 1);
}

#[tokio::test]
async fn memory_is_shared_by_all_sessions() {
    let (tenants, tenant) = tenant(1, Quotas { memory_bytes: 100, ..Quotas::default() });
    let (one, two) = (tenant.open_session().unwrap(), tenant.open_session().unwrap());
    assert!(one.grow(60) && two.grow(40));
    assert!(!one.grow(1) && !two.grow(u64::MAX));
    assert_eq!(tenant.usage().refused.memory_bytes, 2);
    drop(one.admit().await.unwrap());
    two.set_memory(41);
    assert_eq!(quota_of(one.admit().await), "memory_bytes");
    two.set_memory(10);
    assert!(one.grow(30));
    drop(one.admit().await.unwrap());
    let usage = tenant.usage();
    assert_eq!((usage.memory_bytes, usage.memory_bytes_peak), (100, 101));
    drop(one);
    assert_eq!(tenant.usage().memory_bytes, 10);
    drop(two);
    assert_idle(&tenants, 1);
}

#[tokio::test(start_paused = true)]
async fn cells_wait_in_a_bounded_queue_for_a_bounded_time() {
    let quotas = Quotas { cells: 1, queue: 2, queue_wait: 50 * MS, ..Quotas::default() };
    let (tenants, tenant) = tenant(4, quotas);
    let seat = tenant.open_session().unwrap();
    let turn = seat.admit().await.unwrap();
    let (mut first, mut second) = (Box::pin(seat.admit()), Box::pin(seat.admit()));
    assert!(poll(first.as_mut()).is_pending() && poll(second.as_mut()).is_pending());
    assert_eq!(quota_of(seat.admit().await), "queue");
    let usage = tenant.usage();
    assert_eq!((usage.cells_running, usage.cells_waiting, usage.refused.queue), (1, 2, 1));

    tokio::time::advance(20 * MS).await;
    turn.finish(5 * MS);
    assert!(poll(second.as_mut()).is_pending(), "first come, first served");
    let turn = first.await.unwrap();
    tokio::time::advance(31 * MS).await;
    assert_eq!(quota_of(second.await), "queue_wait");
    assert_eq!(tenant.usage().refused.queue_wait, 1);
    assert_eq!(tenant.usage().delayed, (20 + 51) * MS);

    let mut third = Box::pin(seat.admit());
    assert!(poll(third.as_mut()).is_pending());
    tenant.set_quotas(Quotas { cells: 2, ..tenant.quotas() }).unwrap();
    drop((third.await.unwrap(), turn));
    assert_eq!((tenant.usage().cells, tenant.usage().compute), (3, 5 * MS));
    drop(seat);
    assert_idle(&tenants, 4);
}

#[tokio::test(start_paused = true)]
async fn a_nested_cell_runs_within_the_slot_of_another() {
    let quotas = Quotas {
        cells: 1,
        queue: 1,
        queue_wait: 50 * MS,
        compute_per_second: 100 * MS,
        ..Quotas::default()
    };
    let (tenants, tenant) = tenant(4, quotas);
    let (seat, child) = (tenant.open_session().unwrap(), tenant.open_nested_session().unwrap());
    let mut turn = seat.admit().await.unwrap();
    turn.pause(5 * MS);
    let mut waiting = Box::pin(seat.admit());
    assert!(poll(waiting.as_mut()).is_pending());
    let nested = child.admit().await.unwrap();
    let usage = tenant.usage();
    assert_eq!((usage.cells_running, usage.cells_waiting, usage.cells), (2, 1, 2));
    nested.finish(250 * MS);
    assert!(poll(waiting.as_mut()).is_pending(), "its end frees no slot");

    // In debt it begins late, beyond what a cell may wait in the queue, which is full.
    let since = tokio::time::Instant::now();
    child.admit().await.unwrap().finish(NONE);
    assert!(since.elapsed() > 50 * MS, "{:?}", since.elapsed());
    assert_eq!(quota_of(waiting.await), "queue_wait");

    child.set_memory(tenant.quotas().memory_bytes + 1);
    assert_eq!(quota_of(child.admit().await), "memory_bytes");
    drop((turn, seat, child));
    assert_idle(&tenants, 4);
}

#[tokio::test(start_paused = true)]
async fn compute_is_held_to_its_rate() {
    let quotas = Quotas { compute_per_second: 100 * MS, ..Quotas::default() };
    let (tenants, tenant) = tenant(4, quotas);
    for sessions in [1, 40] {
        // A second after the last debt the burst is there again.
        tokio::time::advance(Duration::from_secs(3)).await;
        let (since, before) = (tokio::time::Instant::now(), tenant.usage());
        let tasks: Vec<_> = (0..sessions)
            .map(|_| {
                let seat = tenant.open_session().unwrap();
                tokio::spawn(async move {
                    let mut turn = seat.admit().await.unwrap();
                    for _ in 0..(1000 / sessions) {
                        turn.slice_end(MS).await;
                    }
                    turn.finish(NONE);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        // A second of compute, of which 100 ms are the burst. Each session may begin a slice early,
        // and at its end sleeps for one that it doesn't begin: 10 ms.
        let elapsed = since.elapsed().as_millis() as i32;
        let most = 9_050 + sessions * 10;
        assert!((8_800..=most).contains(&elapsed), "{sessions} sessions: {elapsed} ms");
        assert_eq!(tenant.usage().compute - before.compute, 1000 * MS);
        assert!(tenant.usage().delayed > before.delayed);
    }
    assert_idle(&tenants, 4);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_ends_a_slice_is_held_to_its_rate_too() {
    let quotas = Quotas { compute_per_second: 100 * MS, ..Quotas::default() };
    let (tenants, tenant) = tenant(1, quotas);
    let seat = tenant.open_session().unwrap();
    let mut turn = seat.admit().await.unwrap();
    let since = tokio::time::Instant::now();
    for _ in 0..500 {
        turn.pause(MS);
        turn.resume().await;
    }
    let elapsed = since.elapsed().as_millis();
    assert!((3_950..=4_100).contains(&elapsed), "{elapsed} ms");
    drop((turn, seat));
    assert_idle(&tenants, 1);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_in_debt_holds_no_processor_and_its_new_cells_wait() {
    let quotas = Quotas { compute_per_second: 10 * MS, queue: 1, ..Quotas::default() };
    let (tenants, tenant) = tenant(1, quotas);
    let other = tenants.default_tenant().open_session().unwrap();
    let seat = tenant.open_session().unwrap();
    let mut turn = seat.admit().await.unwrap();
    {
        let mut slice = pin!(turn.slice_end(30 * MS));
        assert!(poll(slice.as_mut()).is_pending());
        drop(other.admit().await.unwrap());
        let mut waiting = Box::pin(seat.admit());
        assert!(poll(waiting.as_mut()).is_pending());
        assert_eq!(tenant.usage().cells_waiting, 1);
        assert_eq!(quota_of(seat.admit().await), "queue");
        tokio::time::advance(1_900 * MS).await;
        assert!(poll(slice.as_mut()).is_pending());
        tokio::time::advance(200 * MS).await;
        assert!(poll(slice.as_mut()).is_ready(), "20 ms of debt at 10 ms a second");
        assert!(poll(waiting.as_mut()).is_pending(), "the first one's slice comes before");
    }
    assert_eq!(tenant.usage().cells_waiting, 0, "a dropped wait is no wait");
    drop(turn);

    let debt = Quotas { queue_wait: 100 * MS, ..tenant.quotas() };
    tenant.set_quotas(debt).unwrap();
    seat.admit().await.unwrap().finish(50 * MS);
    assert_eq!(quota_of(seat.admit().await), "queue_wait");
    let mut waiting = Box::pin(seat.admit());
    assert!(poll(waiting.as_mut()).is_pending());
    let rich = Quotas { compute_per_second: Duration::from_secs(10), ..tenant.quotas() };
    tenant.set_quotas(rich).unwrap();
    tokio::time::advance(6 * MS).await;
    assert!(waiting.await.is_ok(), "a new rate counts at once");
    drop((seat, other));
    assert_idle(&tenants, 1);
}

#[tokio::test]
async fn lm_calls_are_counted_over_the_life_of_the_tenant() {
    let (tenants, tenant) = tenant(1, Quotas { lm_calls: 5, ..Quotas::default() });
    let seat = tenant.open_session().unwrap();
    let lm = seat.admit().await.unwrap().lm();
    lm.calls(3).unwrap();
    let refused = lm.calls(3).unwrap_err();
    assert_eq!(refused.to_string(), "tenant `a` is over its quota of lm_calls: 3 + 3 > 5");
    lm.calls(2).unwrap();
    let (usage, again) = (tenant.usage(), seat.admit().await.unwrap().lm());
    assert_eq!((usage.lm_calls, usage.refused.lm_calls), (5, 3));
    assert_eq!(quota_of(again.calls(1)), "lm_calls");
    tenant.set_quotas(Quotas { lm_calls: 6, ..tenant.quotas() }).unwrap();
    again.calls(1).unwrap();
    drop((seat, lm, again));
    assert_idle(&tenants, 1);
}

#[tokio::test]
async fn prompts_in_flight_are_shared_by_all_sessions() {
    let (tenants, tenant) = tenant(2, Quotas { lm_concurrency: 4, ..Quotas::default() });
    let seat = tenant.open_session().unwrap();
    let lm = seat.admit().await.unwrap().lm();
    let first = lm.permits(3).await;
    let second = lm.permits(100).await;
    assert_eq!((first.count(), second.count()), (3, 1));
    let mut third = Box::pin(lm.permits(2));
    let mut dropped = Box::pin(lm.permits(2));
    let mut fourth = Box::pin(lm.permits(2));
    assert!(poll(third.as_mut()).is_pending() && poll(dropped.as_mut()).is_pending());
    assert!(poll(fourth.as_mut()).is_pending());
    drop(first);
    drop(dropped);
    let third = third.await;
    assert_eq!((third.count(), fourth.await.count()), (2, 1));
    drop((second, third));
    tenant.set_quotas(Quotas { lm_concurrency: 1, ..tenant.quotas() }).unwrap();
    assert_eq!(lm.permits(9).await.count(), 1);
    drop((seat, lm));
    assert_idle(&tenants, 2);
}

#[tokio::test]
async fn a_turn_whose_future_was_dropped_gets_a_processor_again() {
    let (tenants, tenant) = tenant(1, Quotas::default());
    let seat = tenant.open_session().unwrap();
    let (mut one, mut other) = (seat.admit().await.unwrap(), Box::pin(seat.admit()));
    assert!(poll(other.as_mut()).is_pending());
    {
        let mut slice = pin!(one.slice_end(MS));
        assert!(poll(slice.as_mut()).is_pending(), "the executor first");
        assert!(poll(slice.as_mut()).is_pending(), "the other one is next");
    }
    let mut other = other.await.unwrap();
    {
        let mut slice = pin!(one.slice_end(NONE));
        for _ in 0..3 {
            assert!(poll(slice.as_mut()).is_pending());
        }
        other.pause(MS);
        other.pause(NONE);
        assert!(poll(slice.as_mut()).is_ready());
    }
    one.resume().await;
    drop(one);
    other.resume().await;
    assert_eq!(tenants.shared.gate.census(), (0, 0, 0, 1));
    drop((other, seat));
    assert_idle(&tenants, 1);
}

async fn begin(tenant: &Tenant) -> (Seat, Turn) {
    let seat = tenant.open_session().unwrap();
    let turn = seat.admit().await.unwrap();
    (seat, turn)
}

#[test]
fn what_cells_hold_can_move_between_threads() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Tenants>();
    check::<Tenant>();
    check::<Seat>();
    check::<Turn>();
    check::<super::LmQuota>();
    check::<super::turn::LmPermits>();
}
