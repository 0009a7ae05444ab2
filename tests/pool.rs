//! Hibernation by policy: many sessions, memory for few.

mod common;

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use common::store_root;
use kaa::{
    Environment, EnvironmentExt, EnvironmentOptions, Error, Image, Pool, PoolPolicy,
    PooledEnvironment, Runtime, Store, Tool, Value,
};

fn runtime() -> Arc<Runtime> {
    static RUNTIME: OnceLock<Arc<Runtime>> = OnceLock::new();
    let open = || Arc::new(Runtime::open(Store::open(store_root()).unwrap()).unwrap());
    Arc::clone(RUNTIME.get_or_init(open))
}

fn image() -> Image {
    runtime().image("base", &|_| {}).unwrap()
}

fn pool(policy: PoolPolicy) -> Pool {
    Pool::new(runtime(), policy).unwrap()
}

/// Nothing happens by itself but what the test asks for.
fn patient() -> PoolPolicy {
    PoolPolicy { idle: Duration::from_secs(3600), free_bytes: 0, ..PoolPolicy::default() }
}

async fn open(pool: &Pool) -> PooledEnvironment {
    pool.environment(&image(), EnvironmentOptions::default()).await.unwrap()
}

async fn value(session: &mut PooledEnvironment, cell: &str) -> String {
    let execution = session.execute(cell).await.unwrap();
    execution.value.unwrap_or_else(|| execution.stderr.text().into_owned())
}

#[tokio::test]
async fn only_so_many_are_awake_and_none_forgets() {
    let pool = pool(PoolPolicy { awake: 10, ..patient() });
    let mut sessions = Vec::new();
    for n in 0..40 {
        let mut session = open(&pool).await;
        session.execute(&format!("x = {n}; g = iter(range({n}, 1000))")).await.unwrap();
        sessions.push(session);
    }
    let status = pool.status();
    assert_eq!((status.awake, status.hibernated, status.hibernations), (10, 30, 30), "{status:?}");
    assert!(status.file_bytes > 0 && status.private_bytes > 0, "{status:?}");
    for (n, session) in sessions.iter_mut().enumerate() {
        assert_eq!(value(session, "x, next(g)").await, format!("({n}, {n})"));
    }
    let status = pool.status();
    assert_eq!((status.awake, status.hibernated), (10, 30), "{status:?}");
    assert!(status.wakes >= 30, "{status:?}");
    drop(sessions);
    let status = pool.status();
    assert_eq!((status.awake, status.hibernated, status.file_bytes), (0, 0, 0));
}

#[tokio::test]
async fn what_idles_is_hibernated_and_woken_by_any_use() {
    let pool = pool(PoolPolicy { idle: Duration::from_millis(20), ..patient() });
    let mut session = open(&pool).await;
    session.execute("x = 5").await.unwrap();
    let idle = async |pool: &Pool| {
        for _ in 0..500 {
            if pool.status().hibernated == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nothing was hibernated: {:?}", pool.status());
    };
    idle(&pool).await;
    assert_eq!(session.get_variable("x").await.unwrap(), Some(Value::Int(5)));
    idle(&pool).await;
    session.register_tool(Tool::new("seven", |_| Ok(Value::Int(7)))).unwrap();
    assert_eq!(value(&mut session, "seven() + x").await, "12");
    idle(&pool).await;
    let snapshot = session.snapshot().await.unwrap();
    idle(&pool).await;
    let mut fork = session.fork().await.unwrap();
    assert_eq!(fork.execute("seven() + x").await.unwrap().value.unwrap(), "12");
    drop(fork);
    idle(&pool).await;
    session.reset().await.unwrap();
    idle(&pool).await;
    session.restore(&snapshot).await.unwrap();
    assert_eq!(session.list_variables().await.unwrap().len(), 1);
}

#[tokio::test]
async fn memory_is_a_reason_too() {
    let pool = pool(PoolPolicy { memory_bytes: 40 << 20, ..patient() });
    let mut sessions = Vec::new();
    for _ in 0..6 {
        let mut session = open(&pool).await;
        session.execute("x = bytearray(b'x' * 10_000_000)").await.unwrap();
        session.snapshot().await.unwrap();
        sessions.push(session);
    }
    assert_eq!(pool.status().hibernated, 0);
    assert!(pool.sweep().await > 0);
    let status = pool.status();
    assert!(status.private_bytes <= 40 << 20 && status.awake > 0, "{status:?}");
    assert_eq!(value(&mut sessions[0], "len(x)").await, "10000000");
    let everything = PoolPolicy { free_bytes: u64::MAX, ..patient() };
    let pool = Pool::new(runtime(), everything).unwrap();
    let mut session = open(&pool).await;
    session.execute("x = 1").await.unwrap();
    let hibernated = pool.sweep().await;
    assert_eq!(hibernated, usize::from(cfg!(target_os = "linux")), "no machine has that much free");
}

#[tokio::test]
async fn one_with_open_files_stays_awake_and_says_so() {
    let pool = pool(PoolPolicy { idle: Duration::from_millis(1), ..patient() });
    let mut session = open(&pool).await;
    session.execute("f = open('/tmp/a', 'w'); f.write('kept')").await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    pool.sweep().await;
    pool.sweep().await;
    let status = pool.status();
    assert_eq!((status.awake, status.hibernated, status.refused), (1, 0, 1), "{status:?}");
    session.execute("f.close()").await.unwrap();
    while pool.status().hibernated == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        pool.sweep().await;
    }
    assert_eq!(value(&mut session, "open('/tmp/a').read()").await, "'kept'");
}

#[tokio::test]
async fn a_policy_that_makes_no_sense_is_refused() {
    for (policy, field) in [
        (PoolPolicy { awake: 0, ..patient() }, "policy.awake"),
        (PoolPolicy { idle: Duration::ZERO, ..patient() }, "policy.idle"),
    ] {
        let error = Pool::new(runtime(), policy).unwrap_err();
        assert!(matches!(&error, Error::Invalid { what, .. } if what == field), "{error}");
    }
}

#[tokio::test]
async fn a_call_that_is_given_up_while_a_session_wakes_costs_nothing() {
    let mut session = runtime().environment(&image(), EnvironmentOptions::default()).unwrap();
    session.execute("x = 7").await.unwrap();
    for polls in 0..20 {
        session.hibernate().await.unwrap();
        {
            let mut call = std::pin::pin!(session.execute("x += 1"));
            for _ in 0..polls {
                let polled =
                    std::future::poll_fn(|context| Poll::Ready(call.as_mut().poll(context)));
                if polled.await.is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        let x = session.execute("x").await.unwrap().value;
        assert!(matches!(x.as_deref(), Some("7" | "8")), "{x:?} after {polls} polls");
        session.execute("x = 7").await.unwrap();
    }
}
