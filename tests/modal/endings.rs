//! What a user meets: each with its own words and what to do about it.

use std::time::Duration;

use kaa::modal::{ModalBackend, ModalClient, ModalImage, ModalOptions, Secret};
use kaa::{Backend, EnvironmentExt, EnvironmentOptions, Limits, Progress, Status};
use std::sync::Mutex;
use tonic::Code;

use crate::cloud::{Fault, GenericStatus};
use crate::{all_ended, backend, config, running, session, stand_in};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_ends_says_why() {
    for (status, part) in [
        (GenericStatus::Timeout, "modal.timeout"),
        (GenericStatus::Terminated, "somebody"),
        (GenericStatus::MemoryManagerEviction, "evicted"),
        (GenericStatus::KernelOomKill, "limits.memory_bytes"),
        (GenericStatus::InternalFailure, "Modal failed"),
    ] {
        let stand_in = stand_in().await;
        let mut session = session(&stand_in).await;
        session.execute("kept = 1").await.expect("a cell");
        let id = stand_in.sandboxes()[0].id.clone();
        let ending = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            stand_in.end_sandbox(&id, status);
        };
        let (error, ()) = tokio::join!(session.execute("import time; time.sleep(60)"), ending);
        let error = error.expect_err("its sandbox is gone");
        assert!(error.poisons() && error.to_string().contains(part), "{status:?}: {error}");
        assert_eq!(session.status(), Status::Poisoned);
        session.reset().await.expect("another sandbox");
        let cell = session.execute("'kept' in dir()").await.expect("a cell");
        assert_eq!(cell.value.as_deref(), Some("False"));
        session.close().await.expect("the end");
        assert_eq!(running(&stand_in), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_are_refused_are_named_and_not_shown() {
    let stand_in = stand_in().await;
    let mut config = config(&stand_in);
    config.token_secret = "as-wrong-and-secret".into();
    let error = ModalClient::connect(config).await.expect_err("wrong").to_string();
    assert!(error.contains("refused the token") && error.contains("modal token new"), "{error}");
    assert!(!error.contains("as-wrong-and-secret"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_can_not_be_built_shows_the_end_of_its_log() {
    let stand_in = stand_in().await;
    let image = ModalImage::default()
        .dockerfile_commands(["RUN echo a step that works", "RUN echo what went wrong; exit 3"]);
    let options = ModalOptions { image, ..ModalOptions::default() };
    let lines = Mutex::new(Vec::new());
    let progress = |event: Progress| {
        if let Progress::Log { line } = event {
            lines.lock().expect("nobody panicked").push(line);
        }
    };
    let error = ModalBackend::connect(config(&stand_in), options, &progress).await;
    let error = error.expect_err("it fails").to_string();
    assert!(error.contains("build failed") && error.contains("what went wrong"), "{error}");
    let lines = lines.into_inner().expect("nobody panicked");
    assert!(lines.iter().any(|line| line.contains("a step that works")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_over_its_limit_is_told_from_a_throttled_one() {
    let stand_in = stand_in().await;
    let backend = backend(&stand_in).await;
    stand_in.fault("SandboxCreateV2", Fault::Before(Code::ResourceExhausted));
    let error = backend.open(EnvironmentOptions::default()).await.err().expect("no sandbox");
    assert!(error.to_string().contains("kaa modal clean"), "{error}");
    let session = backend.open(EnvironmentOptions::default()).await.expect("the next one is there");
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_account_or_the_image_does_not_have_is_named() {
    let stand_in = stand_in().await;
    let secrets = vec![Secret::Named("no-such-secret".into())];
    let options = ModalOptions { secrets, ..ModalOptions::default() };
    let error = ModalBackend::connect(config(&stand_in), options, &|_| {}).await;
    let error = error.expect_err("no secret").to_string();
    assert!(error.contains("no-such-secret"), "{error}");
    let options = ModalOptions { python: "no-such-python".into(), ..ModalOptions::default() };
    let backend = ModalBackend::connect(config(&stand_in), options, &|_| {}).await.expect("it");
    let error = backend.open(EnvironmentOptions::default()).await.err().expect("no Python");
    assert!(error.to_string().contains("Python 3.9"), "{error}");
    all_ended(&stand_in).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_modal_can_not_do_is_refused_before_a_sandbox_is_made() {
    let stand_in = stand_in().await;
    let backend = backend(&stand_in).await;
    let fuel = Limits { fuel: 1000, ..Limits::default() };
    let policy =
        |name: &str| kaa::Policy { env: vec![(name.into(), "1".into())], ..kaa::Policy::default() };
    for (options, part) in [
        (EnvironmentOptions { limits: fuel, ..EnvironmentOptions::default() }, "limits.fuel"),
        (EnvironmentOptions { policy: policy("A-B"), ..EnvironmentOptions::default() }, "A-B"),
    ] {
        let error = backend.open(options).await.err().expect("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(stand_in.sandboxes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cause_of_an_end_is_not_waited_for_without_bound() {
    let stand_in = stand_in().await;
    let mut session = session(&stand_in).await;
    session.execute("1").await.expect("a cell");
    for _ in 0..20 {
        stand_in.fault("TaskExecPoll", Fault::Delay(Duration::from_secs(60)));
    }
    let pids = stand_in.sandboxes()[0].pids.clone();
    let is_python = |pid: &&i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("python")
    };
    // The supervisor was there first.
    let supervisor = pids.iter().filter(is_python).min().expect("it runs");
    let pid = rustix::process::Pid::from_raw(*supervisor).expect("a number");
    let since = std::time::Instant::now();
    let killing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it's ours");
    };
    let (error, ()) = tokio::join!(session.execute("import time; time.sleep(60)"), killing);
    let error = error.expect_err("its supervisor is dead");
    assert!(error.poisons() && error.to_string().contains("doesn't answer"), "{error}");
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    session.close().await.expect("the end");
}
