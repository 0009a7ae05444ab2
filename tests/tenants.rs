//! Many tenants in one process: quotas, fairness, and giving everything back.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{image, print, run, runtime};
use kaa::lm::ScriptedHandler;
use kaa::{
    Environment, EnvironmentExt, EnvironmentOptions, Error, Limit, Outcome, Pool, PoolPolicy,
    Quotas, Tenant, WasmEnvironment,
};

fn tenant(name: &str, quotas: Quotas) -> Tenant {
    runtime().tenant(name, quotas).unwrap()
}

fn open(tenant: &Tenant) -> kaa::Result<WasmEnvironment> {
    let options = EnvironmentOptions {
        tenant: Some(tenant.clone()),
        lm: Some(Arc::new(ScriptedHandler::echo())),
        ..EnvironmentOptions::default()
    };
    runtime().environment(&image("base"), options)
}

fn quota(error: &Error) -> &str {
    match error {
        Error::Quota { quota, .. } => quota,
        other => panic!("not a quota: {other}"),
    }
}

#[tokio::test]
async fn sessions_are_counted_and_given_back() {
    let tenant = tenant("sessions", Quotas { sessions: 2, ..Quotas::default() });
    let (one, two) = (open(&tenant).unwrap(), open(&tenant).unwrap());
    let error = open(&tenant).unwrap_err();
    assert_eq!(quota(&error), "sessions");
    assert!(error.to_string().contains("`sessions`"), "{error}");
    drop(one);
    let mut three = open(&tenant).unwrap();
    assert_eq!(quota(&three.fork().await.err().unwrap()), "sessions");
    let usage = tenant.usage();
    assert_eq!((usage.sessions, usage.refused.sessions), (2, 2));
    drop((two, three));
    assert_eq!(tenant.usage().sessions, 0);
}

#[tokio::test]
async fn memory_is_that_of_all_sessions() {
    let tenant = tenant("memory", Quotas { memory_bytes: 96 << 20, ..Quotas::default() });
    let (mut one, mut two) = (open(&tenant).unwrap(), open(&tenant).unwrap());
    run(&mut one, "x = bytearray(b'x' * 60_000_000)").await;
    let refused = run(&mut two, "y = bytearray(60_000_000)").await;
    assert_eq!(refused.exception.unwrap().type_name, "MemoryError");
    assert_eq!(print(&mut two, "print(1)").await, "1\n", "the session is as it was");
    let usage = tenant.usage();
    assert!(usage.memory_bytes > 55_000_000, "{usage:?}");
    assert!(usage.refused.memory_bytes > 0, "{usage:?}");
    one.reset().await.unwrap();
    run(&mut one, "1").await;
    one.snapshot().await.unwrap();
    let ok = run(&mut two, "y = bytearray(60_000_000)").await;
    assert_eq!(ok.outcome, Outcome::Completed, "{}", ok.stderr.text());
    drop((one, two));
    assert_eq!(tenant.usage().memory_bytes, 0);
}

#[tokio::test]
async fn lm_calls_are_those_of_all_sessions() {
    let tenant = tenant("calls", Quotas { lm_calls: 3, ..Quotas::default() });
    let (mut one, mut two) = (open(&tenant).unwrap(), open(&tenant).unwrap());
    run(&mut one, "llm_query('a'); llm_query('b')").await;
    let answers = print(&mut two, "print(llm_query('c')); print(llm_query('d'))").await;
    let (first, second) = answers.split_once('\n').unwrap();
    assert!(!first.contains("quota"), "{answers}");
    assert!(second.starts_with("Error: ") && second.contains("quota of lm_calls"), "{answers}");
    assert_eq!((tenant.usage().lm_calls, tenant.usage().refused.lm_calls), (3, 1));
}

#[tokio::test]
async fn cells_beyond_the_quota_wait_in_a_queue_that_ends() {
    let quotas =
        Quotas { cells: 1, queue: 1, queue_wait: Duration::from_millis(1500), ..Quotas::default() };
    let tenant = tenant("cells", quotas);
    let sessions: Vec<_> = (0..3).map(|_| open(&tenant).unwrap()).collect();
    let mut cells = Vec::new();
    for mut session in sessions {
        cells.push(tokio::spawn(async move {
            let result = session.execute("import time; time.sleep(4)").await;
            (result, session)
        }));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut found = Vec::new();
    for cell in cells {
        let (result, mut session) = cell.await.unwrap();
        found.push(result.as_ref().map_or_else(quota, |_| "ran").to_owned());
        session.execute("1").await.unwrap();
    }
    assert_eq!(found, ["ran", "queue_wait", "queue"]);
    let usage = tenant.usage();
    assert_eq!((usage.cells_running, usage.cells_waiting, usage.cells), (0, 0, 4));
}

#[tokio::test]
async fn an_interrupt_reaches_a_cell_that_waits_to_begin() {
    let tenant = tenant("one", Quotas { cells: 1, ..Quotas::default() });
    let mut busy = open(&tenant).unwrap();
    let stop_busy = busy.interrupt();
    let busy = tokio::spawn(async move { busy.execute("import time; time.sleep(300)").await });
    while tenant.usage().cells_running == 0 {
        tokio::task::yield_now().await;
    }
    let pool = Pool::new(Arc::clone(runtime()), PoolPolicy::default()).unwrap();
    let pooled = pool.adopt(open(&tenant).unwrap());
    let waiting: [Box<dyn Environment>; 2] = [Box::new(open(&tenant).unwrap()), Box::new(pooled)];
    for mut session in waiting {
        let stop = session.interrupt();
        // Nothing is there to be stopped yet: the cell that comes waits all the same.
        stop.interrupt();
        let mut cell = Box::pin(session.execute("x = 1"));
        let soon = tokio::time::timeout(Duration::from_millis(50), cell.as_mut()).await;
        assert!(soon.is_err(), "{soon:?}");
        assert_eq!(tenant.usage().cells_waiting, 1);
        stop.interrupt();
        let stopped = cell.await.unwrap();
        assert_eq!((stopped.outcome, stopped.limit), (Outcome::Raised, Some(Limit::Interrupt)));
        assert_eq!(stopped.exception.unwrap().type_name, "KeyboardInterrupt");
        assert!(stopped.stderr.text().contains("before the cell began"));
        assert_eq!((tenant.usage().cells_waiting, tenant.usage().cells_running), (0, 1));
        tenant.set_quotas(Quotas { cells: 2, ..tenant.quotas() }).unwrap();
        assert_eq!(session.execute("'x' in globals()").await.unwrap().value.unwrap(), "False");
        tenant.set_quotas(Quotas { cells: 1, ..tenant.quotas() }).unwrap();
    }
    stop_busy.interrupt();
    let stopped = busy.await.unwrap().unwrap();
    assert_eq!(stopped.exception.unwrap().type_name, "KeyboardInterrupt");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_that_spins_for_ever_leaves_room_and_gives_everything_back() {
    let greedy = tenant("greedy", Quotas::default());
    let modest = tenant("modest", Quotas::default());
    let mut session = open(&modest).unwrap();
    let mut spinning = Vec::new();
    for _ in 0..200 {
        let mut session = open(&greedy).unwrap();
        let stop = session.interrupt();
        let cell = tokio::spawn(async move { session.execute("while True: pass").await });
        spinning.push((stop, cell));
    }
    while greedy.usage().cells < 200 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let before = greedy.usage().compute;
    for n in 0..20 {
        assert_eq!(print(&mut session, &format!("print({n})")).await, format!("{n}\n"));
    }
    // 20 cells among 200 that spin: with turns in the order of arrival each would have waited for
    // 200 slices, some 100 ms of two processors.
    let spent = greedy.usage().compute - before;
    assert!(spent < Duration::from_secs(2), "the others computed for {spent:?} meanwhile");
    let (dropped, stopped) = spinning.split_at_mut(100);
    for (_, cell) in dropped {
        cell.abort();
    }
    // Once is enough, wherever each of them is: most have not come to their code yet.
    stopped.iter().for_each(|(stop, _)| stop.interrupt());
    for (_, cell) in stopped {
        let outcome = cell.await.unwrap().unwrap();
        assert_eq!(outcome.exception.unwrap().type_name, "KeyboardInterrupt");
    }
    for _ in 0..1000 {
        if greedy.usage().sessions == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let usage = greedy.usage();
    assert_eq!(
        (usage.sessions, usage.memory_bytes, usage.cells_running, usage.cells_waiting),
        (0, 0, 0, 0)
    );
    assert!(usage.compute > Duration::ZERO);
    assert_eq!(print(&mut session, "print(1)").await, "1\n");
    assert!(runtime().usage().iter().any(|usage| usage.name == "modest"));
}

#[tokio::test]
async fn compute_per_second_slows_a_tenant_down() {
    let quotas = Quotas { compute_per_second: Duration::from_millis(100), ..Quotas::default() };
    let tenant = tenant("slow", quotas);
    let mut session = open(&tenant).unwrap();
    run(&mut session, "for n in range(8_000_000): pass").await;
    let usage = tenant.usage();
    assert!(usage.compute > Duration::from_millis(150), "{usage:?}");
    assert!(usage.delayed > usage.compute, "{usage:?}");
}
