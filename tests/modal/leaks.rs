//! Whatever becomes of the network, of answers and of who waits for them: no sandbox is left running.

use std::time::Duration;

use kaa::modal::{ModalBackend, ModalOptions, SandboxSpec};
use kaa::{Backend, EnvironmentExt, EnvironmentOptions};
use tonic::Code;

use crate::cloud::Fault;
use crate::{all_ended, backend, client, config, running, session, stand_in};

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_lost_to_an_outage_is_ended_after_it() {
    for closes in [false, true] {
        let stand_in = stand_in().await;
        let options = ModalOptions { patience: Duration::from_secs(1), ..ModalOptions::default() };
        let backend = ModalBackend::connect(config(&stand_in), options, &|_| {}).await.expect("it");
        let mut session = backend.open(EnvironmentOptions::default()).await.expect("a session");
        session.execute("1").await.expect("a cell");
        stand_in.refuse_connections(true);
        stand_in.cut_connections();
        if closes {
            session.close().await.expect_err("there is no network");
        } else {
            drop(session);
        }
        // Longer than the tries of one call take.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(running(&stand_in), 1);
        stand_in.refuse_connections(false);
        all_ended(&stand_in).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_making_was_never_answered_is_found_and_ended() {
    let stand_in = stand_in().await;
    let backend = backend(&stand_in).await;
    let kept = session(&stand_in).await;
    for _ in 0..4 {
        stand_in.fault("SandboxCreateV2", Fault::After(Code::Unavailable));
    }
    // Nor is it seen at once.
    stand_in.fault("SandboxListV2", Fault::Before(Code::Unavailable));
    let error = backend.open(EnvironmentOptions::default()).await.err().expect("no answer");
    assert!(error.to_string().contains("can't be reached"), "{error}");
    assert_eq!(stand_in.sandboxes().len(), 2);
    let since = std::time::Instant::now();
    while running(&stand_in) > 1 {
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", stand_in.sandboxes());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(stand_in.sandboxes()[0].is_running, "the other session's was ended");
    kept.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_nobody_waits_for_any_more_is_ended() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let spec = SandboxSpec::default();
    client.create_sandbox(&spec, &|_| {}).await.expect("an image").terminate().await.expect("it");
    let made = stand_in.sandboxes().len();
    stand_in.fault("SandboxCreateV2", Fault::Delay(Duration::from_millis(400)));
    let making = client.create_sandbox(&spec, &|_| {});
    let made_in_time = tokio::time::timeout(Duration::from_millis(300), making).await;
    assert!(made_in_time.is_err());
    // The windows between its making, the answer, and who takes it.
    let mut time = Duration::from_millis(3);
    let mut dropped = 0;
    for _ in 0..40 {
        let making = client.create_sandbox(&spec, &|_| {});
        match tokio::time::timeout(time, making).await {
            Ok(sandbox) => {
                sandbox.expect("a sandbox").terminate().await.expect("its end");
                time = time * 9 / 10;
            }
            Err(_) => {
                dropped += 1;
                time = time * 11 / 10;
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(dropped > 0 && stand_in.sandboxes().len() > made, "{dropped}");
    all_ended(&stand_in).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sandbox_tells_whose_it_is() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let tags = vec![("team".to_owned(), "a".to_owned())];
    let spec = SandboxSpec { tags, ..SandboxSpec::default() };
    let sandbox = client.create_sandbox(&spec, &|_| {}).await.expect("a sandbox");
    let found = client.sandboxes(Some("kaa")).await.expect("a list");
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].id.as_str(), found[0].has_owner), (sandbox.id(), Some(true)));
    let names: Vec<&str> = found[0].tags.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["team", "kaa-session", "kaa-owner"]);
    // What comes to the same app knows that its process lives.
    session(&stand_in).await.close().await.expect("the end");
    assert_eq!(running(&stand_in), 1);
    sandbox.terminate().await.expect("its end");
}
