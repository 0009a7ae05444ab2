//! What is special to sessions in processes of this host; the contract is in `conformance.rs`.

use std::time::Duration;

use kaa::{
    Backend, Environment, EnvironmentExt, EnvironmentOptions, Execution, Limits, LocalBackend,
    LocalOptions, Outcome, Status,
};

fn backend() -> LocalBackend {
    let path = std::env::var("PATH").unwrap();
    LocalBackend::new(LocalOptions { path, ..LocalOptions::default() })
}

async fn open(options: EnvironmentOptions) -> Box<dyn Environment> {
    backend().open(options).await.unwrap()
}

async fn run(session: &mut Box<dyn Environment>, code: &str) -> Execution {
    session.execute(code).await.unwrap()
}

#[tokio::test]
async fn cells_run_and_state_stays() {
    let mut session = open(EnvironmentOptions::default()).await;
    let first = run(&mut session, "x = 41\nprint('a')\nx + 1").await;
    assert_eq!((first.stdout.text().as_ref(), first.value.as_deref()), ("a\n", Some("42")));
    for at in 0..200 {
        let n = run(&mut session, "x += 1\nprint(x)").await;
        assert_eq!(n.stdout.text(), format!("{}\n", 42 + at));
    }
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_hard_stop_poisons_and_a_reset_helps() {
    let limits = Limits {
        compute: Duration::from_millis(100),
        grace: Duration::from_millis(100),
        ..Limits::default()
    };
    let mut session = open(EnvironmentOptions { limits, ..EnvironmentOptions::default() }).await;
    let soft = run(&mut session, "x = 1\nwhile True: pass").await;
    assert_eq!(soft.outcome, Outcome::LimitReached);
    assert_eq!(run(&mut session, "x").await.value.as_deref(), Some("1"));
    // In CPython 3.11 a loop's jump back is outside of the `try` around it.
    let stubborn = "print('begun')\ndef spin():\n  while True: pass\nwhile True:\n  try: spin()\n  except BaseException: pass";
    let hard = run(&mut session, stubborn).await;
    assert_eq!((hard.outcome, hard.rolled_back), (Outcome::LimitReached, false));
    assert_eq!(hard.stdout.text(), "begun\n");
    assert_eq!(session.status(), Status::Poisoned);
    session.reset().await.unwrap();
    assert_eq!(run(&mut session, "'x' in globals()").await.value.as_deref(), Some("False"));
}
