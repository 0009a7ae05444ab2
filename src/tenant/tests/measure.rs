//! What it costs, and what it does for a tenant beside 200 guests that spin. By hand:
//! `cargo test --release measure -- --ignored --nocapture --test-threads=1`

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::{NONE, assert_idle, begin};
use crate::tenant::{Quotas, Tenant, Tenants};

const CELL: Duration = Duration::from_micros(150);

fn burn(time: Duration) -> Duration {
    let since = Instant::now();
    while since.elapsed() < time {
        std::hint::spin_loop();
    }
    since.elapsed()
}

fn quotas() -> Quotas {
    Quotas { compute_per_second: Duration::from_secs(1000), ..Quotas::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_overhead() {
    const ROUNDS: u32 = 300_000;
    let tenants = Tenants::new(2);
    let tenant = tenants.tenant("a", quotas()).unwrap();
    tokio::spawn(async move {
        let seat = tenant.open_session().unwrap();
        let since = Instant::now();
        for _ in 0..ROUNDS {
            drop(black_box(seat.admit().await.unwrap()));
        }
        println!("admit + drop     {:>7.0} ns", nanos(since, ROUNDS));
        let mut turn = seat.admit().await.unwrap();
        let since = Instant::now();
        for _ in 0..ROUNDS {
            turn.pause(Duration::from_nanos(1));
            turn.resume().await;
        }
        println!("pause + resume   {:>7.0} ns", nanos(since, ROUNDS));
        let since = Instant::now();
        for _ in 0..ROUNDS {
            turn.slice_end(Duration::from_nanos(1)).await;
        }
        let slice = nanos(since, ROUNDS);
        let since = Instant::now();
        for _ in 0..ROUNDS {
            tokio::task::yield_now().await;
        }
        let bare = nanos(since, ROUNDS);
        println!("slice_end        {slice:>7.0} ns, of which yield_now alone {bare:.0} ns");
        let since = Instant::now();
        for _ in 0..ROUNDS {
            black_box(turn.is_contended());
        }
        println!("is_contended     {:>7.1} ns", nanos(since, ROUNDS));
    })
    .await
    .unwrap();
}

fn nanos(since: Instant, rounds: u32) -> f64 {
    since.elapsed().as_nanos() as f64 / f64::from(rounds)
}

/// Latencies of cells of a tenant, one after the other with so much time between.
async fn cells(tenant: &Tenant, count: usize, gap: Duration) -> Vec<Duration> {
    let tenant = tenant.clone();
    tokio::spawn(async move {
        let seat = tenant.open_session().unwrap();
        let mut times = Vec::new();
        for _ in 0..count {
            if gap > NONE {
                tokio::time::sleep(gap).await;
            }
            let since = Instant::now();
            let turn = seat.admit().await.unwrap();
            turn.finish(burn(CELL));
            times.push(since.elapsed());
            tokio::task::yield_now().await;
        }
        times.sort();
        times
    })
    .await
    .unwrap()
}

/// The same as seen from a thread outside the executor, which also competes for the cores.
async fn cells_from_outside(tenant: &Tenant, count: usize, gap: Duration) -> Vec<Duration> {
    let (ask, mut asked) = tokio::sync::mpsc::channel::<std::sync::mpsc::Sender<()>>(1);
    let tenant = tenant.clone();
    let server = tokio::spawn(async move {
        let seat = tenant.open_session().unwrap();
        while let Some(answer) = asked.recv().await {
            let turn = seat.admit().await.unwrap();
            turn.finish(burn(CELL));
            answer.send(()).unwrap();
        }
    });
    let client = tokio::task::spawn_blocking(move || {
        let mut times = Vec::new();
        for _ in 0..count {
            std::thread::sleep(gap);
            let (answer, answered) = std::sync::mpsc::channel();
            let since = Instant::now();
            ask.blocking_send(answer).unwrap();
            answered.recv().unwrap();
            times.push(since.elapsed());
        }
        times.sort();
        times
    });
    let times = client.await.unwrap();
    server.await.unwrap();
    times
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_a_neighbour_of_200_spinning_guests() {
    let tenants = Tenants::new(2);
    let (a, b) = (tenants.tenant("a", quotas()).unwrap(), tenants.tenant("b", quotas()).unwrap());
    let show = |what: &str, times: &[Duration]| {
        let at = |share: usize| times[times.len() * share / 100];
        println!("{what:<32} median {:>9.1?}  p90 {:>9.1?}  p99 {:>9.1?}", at(50), at(90), at(99));
        at(50)
    };
    let gaps = [("back to back", NONE), ("every 5 ms", Duration::from_millis(5))];
    let mut alone = Vec::new();
    for (what, gap) in gaps {
        let inside = show(&format!("alone, {what}"), &cells(&b, 400, gap).await);
        let times = cells_from_outside(&b, 400, gap).await;
        alone.push((inside, show(&format!("  from outside, {what}"), &times)));
    }
    let spinning: Vec<_> = (0..200)
        .map(|_| {
            let a = a.clone();
            tokio::spawn(async move {
                let (_seat, mut turn) = begin(&a).await;
                loop {
                    let slice = if turn.is_contended() { 200 } else { 1000 };
                    let computed = burn(Duration::from_micros(slice));
                    turn.slice_end(computed).await;
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    for ((what, gap), alone) in gaps.into_iter().zip(alone) {
        let inside = show(&format!("beside 200, {what}"), &cells(&b, 400, gap).await);
        let times = cells_from_outside(&b, 400, gap).await;
        let outside = show(&format!("  from outside, {what}"), &times);
        let ratio = |now: Duration, before: Duration| now.as_secs_f64() / before.as_secs_f64();
        let (inside, outside) = (ratio(inside, alone.0), ratio(outside, alone.1));
        println!("{inside:>42.2} times as long, from outside {outside:.2}");
    }
    for task in &spinning {
        task.abort();
    }
    for task in spinning {
        assert!(task.await.is_err(), "it spins for ever");
    }
    assert_idle(&tenants, 2);
}
