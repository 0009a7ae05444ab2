//! Who is next, without a look at the clock: guests say how long they computed, and are polled by hand.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use super::{MS, NONE, assert_idle, begin, poll};
use crate::tenant::{Quotas, Tenant, Tenants};

/// What guests compute per slice.
const SLICE: Duration = Duration::from_micros(200);

fn pair(processors: usize) -> (Tenants, Tenant, Tenant) {
    let tenants = Tenants::new(processors);
    let quotas = Quotas { compute_per_second: Duration::from_secs(1000), ..Quotas::default() };
    let a = tenants.tenant("a", quotas.clone()).unwrap();
    let b = tenants.tenant("b", quotas).unwrap();
    (tenants, a, b)
}

/// Guests that spin until they're told to stop.
fn spin(
    tasks: &mut tokio::task::JoinSet<()>,
    tenant: &Tenant,
    guests: usize,
    slice: Duration,
    slices: &Rc<Cell<u64>>,
    stop_at: u64,
) {
    for _ in 0..guests {
        let (tenant, slices) = (tenant.clone(), Rc::clone(slices));
        tasks.spawn_local(async move {
            let (_seat, mut turn) = begin(&tenant).await;
            while slices.get() < stop_at {
                slices.set(slices.get() + 1);
                turn.slice_end(slice).await;
            }
        });
    }
}

#[tokio::test]
async fn a_newcomer_is_next_after_at_most_one_slice() {
    let (tenants, a, b) = pair(1);
    let (_seat, mut first) = begin(&a).await;
    // A head start: nobody waited for it.
    first.slice_end(Duration::from_secs(100)).await;
    let seats: Vec<_> = (0..200).map(|_| a.open_session().unwrap()).collect();
    let mut others: Vec<_> = seats.iter().map(|seat| Box::pin(seat.admit())).collect();
    for other in &mut others {
        assert!(poll(other.as_mut()).is_pending());
    }
    assert!(!first.is_contended(), "there is only one tenant");
    let seat = b.open_session().unwrap();
    for round in 0..1000 {
        let mut newcomer = Box::pin(seat.admit());
        assert!(poll(newcomer.as_mut()).is_pending());
        assert!(first.is_contended());
        let mut slice = pin!(first.slice_end(SLICE));
        assert!(poll(slice.as_mut()).is_pending());
        assert!(poll(newcomer.as_mut()).is_pending());
        assert!(poll(slice.as_mut()).is_pending());
        let turn = newcomer.await;
        turn.unwrap().finish(SLICE * 3 / 4);
        // The processor went to the head of A's line; A goes round until it's the first one's turn.
        assert!(poll(slice.as_mut()).is_pending(), "round {round}");
        let mut turns = Vec::new();
        for other in &mut others {
            let mut turn = match poll(other.as_mut()) {
                std::task::Poll::Ready(turn) => turn.unwrap(),
                std::task::Poll::Pending => panic!("A's guests come in order"),
            };
            turn.pause(NONE);
            turns.push(turn);
        }
        assert!(poll(slice.as_mut()).is_ready());
        drop(turns);
        others = seats.iter().map(|seat| Box::pin(seat.admit())).collect();
        for other in &mut others {
            assert!(poll(other.as_mut()).is_pending());
        }
    }
    drop(others);
    drop((seats, first, _seat, seat));
    assert_idle(&tenants, 1);
}

#[tokio::test]
async fn busy_tenants_share_alike_whatever_the_number_of_their_sessions() {
    for (processors, guests, slices) in [
        (1, (200, 1), (SLICE, SLICE)),
        (1, (3, 50), (SLICE, 5 * SLICE)),
        (2, (200, 4), (5 * SLICE, SLICE)),
        (4, (30, 30), (SLICE, 3 * SLICE)),
    ] {
        let (tenants, a, b) = pair(processors);
        let count = Rc::new(Cell::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                spin(&mut tasks, &a, guests.0, slices.0, &count, 20_000);
                spin(&mut tasks, &b, guests.1, slices.1, &count, 20_000);
                while tasks.join_next().await.is_some() {}
            })
            .await;
        let (a, b) = (a.usage().compute.as_secs_f64(), b.usage().compute.as_secs_f64());
        assert!((a / b - 1.0).abs() < 0.05, "{processors}, {guests:?}: {a} s to {b} s");
        assert_idle(&tenants, processors);
    }
}

#[tokio::test]
async fn many_tenants_share_alike() {
    let tenants = Tenants::new(2);
    let quotas = Quotas { compute_per_second: Duration::from_secs(1000), ..Quotas::default() };
    let all: Vec<_> =
        (0..20).map(|n| tenants.tenant(&format!("t{n}"), quotas.clone()).unwrap()).collect();
    let count = Rc::new(Cell::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            for (guests, tenant) in (1..).zip(&all) {
                spin(&mut tasks, tenant, guests, SLICE, &count, 20_000);
            }
            while tasks.join_next().await.is_some() {}
        })
        .await;
    for tenant in &all {
        let share = tenant.usage().compute.as_secs_f64() / (20_000.0 * SLICE.as_secs_f64());
        assert!((share * 20.0 - 1.0).abs() < 0.05, "{}: {share}", tenant.name());
    }
    assert_idle(&tenants, 2);
}

/// Slices that each tenant got of the next `slices`, when B turns up with 40 guests after A and B
/// have run as `before` says.
async fn shares_after(
    processors: usize,
    before: impl AsyncFnOnce(&Tenant, &Tenant),
    slices: u64,
) -> f64 {
    let (tenants, a, b) = pair(processors);
    before(&a, &b).await;
    let had = (a.usage().compute, b.usage().compute);
    let count = Rc::new(Cell::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    tokio::task::LocalSet::new()
        .run_until(async {
            spin(&mut tasks, &a, 40, SLICE, &count, slices);
            spin(&mut tasks, &b, 40, SLICE, &count, slices);
            while tasks.join_next().await.is_some() {}
        })
        .await;
    assert_idle(&tenants, processors);
    let (a, b) = (a.usage().compute - had.0, b.usage().compute - had.1);
    a.as_secs_f64() / b.as_secs_f64()
}

#[tokio::test]
async fn nobody_pays_for_processors_that_were_idle() {
    let alone = shares_after(
        2,
        async |a: &Tenant, _: &Tenant| {
            let (_seat, mut turn) = begin(a).await;
            turn.slice_end(Duration::from_secs(100)).await;
        },
        4_000,
    );
    let ratio = alone.await;
    assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
    // Both ran, one with more processors, and nobody waited.
    let side_by_side = shares_after(
        8,
        async |a: &Tenant, b: &Tenant| {
            let (_seat, mut few) = begin(b).await;
            let mut many = Vec::new();
            for _ in 0..6 {
                many.push(begin(a).await);
            }
            for _ in 0..1000 {
                for (_, turn) in &mut many {
                    turn.slice_end(MS).await;
                }
                few.slice_end(MS).await;
            }
        },
        8_000,
    );
    let ratio = side_by_side.await;
    assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
}

#[tokio::test]
async fn a_tenant_that_could_not_use_its_share_has_no_claim_on_it_later() {
    let (tenants, a, b) = pair(4);
    let count = Rc::new(Cell::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    let ratio = tokio::task::LocalSet::new()
        .run_until(async {
            // B has one guest and so one processor; A has three, and others wait all the time.
            spin(&mut tasks, &a, 40, SLICE, &count, 100_000);
            spin(&mut tasks, &b, 1, SLICE, &count, 100_000);
            while count.get() < 50_000 {
                tokio::task::yield_now().await;
            }
            let had = (a.usage().compute, b.usage().compute);
            assert!(had.0 > had.1 * 2, "{had:?}");
            // With many it takes half from now on, and hardly more.
            spin(&mut tasks, &b, 40, SLICE, &count, 100_000);
            while tasks.join_next().await.is_some() {}
            let (a, b) = (a.usage().compute - had.0, b.usage().compute - had.1);
            b.as_secs_f64() / a.as_secs_f64()
        })
        .await;
    assert!((1.0..1.05).contains(&ratio), "{ratio}");
    assert_idle(&tenants, 4);
}

#[tokio::test]
async fn slices_are_short_only_around_other_tenants() {
    let (_tenants, a, b) = pair(2);
    let (_seat, mut one) = begin(&a).await;
    let (_seat, mut two) = begin(&a).await;
    assert!(!one.is_contended());
    let seat = b.open_session().unwrap();
    let mut waiting = Box::pin(seat.admit());
    assert!(poll(waiting.as_mut()).is_pending());
    assert!(one.is_contended() && two.is_contended());
    drop(waiting);
    two.pause(NONE);
    for _ in 0..10_000 {
        assert!(one.is_contended(), "lately somebody waited");
        one.slice_end(NONE).await;
    }
    assert!(!one.is_contended());
    let other = seat.admit().await.unwrap();
    assert!(one.is_contended(), "two tenants compute");
    drop(other);
    assert!(!one.is_contended());
}
