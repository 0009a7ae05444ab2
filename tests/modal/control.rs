//! The control plane: what it's told, how often it's asked, and what nobody else may see.

use std::fmt::Debug;
use std::time::Duration;

use kaa::modal::{ModalBackend, ModalClient, ModalConfig, ModalImage, ModalOptions};
use kaa::modal::{SandboxSpec, Secret};
use kaa::{Backend, EnvironmentExt, EnvironmentOptions};
use tonic::Code;

use crate::cloud::{Fault, StandIn, StandInOptions};
use crate::{client, config, session, stand_in};

#[tokio::test(flavor = "multi_thread")]
async fn no_debug_output_shows_a_secret() {
    let (value, token_secret) = ("hunter2-of-a-variable", "as-hunter2-of-the-account");
    let options =
        StandInOptions { token_secret: token_secret.into(), record: true, ..Default::default() };
    let stand_in = StandIn::start(options).await;
    let secrets = vec![Secret::Variable { name: "KEY".into(), value: value.into() }];
    let options = ModalOptions { secrets: secrets.clone(), ..ModalOptions::default() };
    let spec = SandboxSpec { secrets, ..SandboxSpec::default() };
    let backend = ModalBackend::connect(config(&stand_in), options.clone(), &|_| {}).await;
    let backend = backend.expect("a backend");
    let client = client(&stand_in).await;
    let sandbox = client.create_sandbox(&spec, &|_| {}).await.expect("a sandbox");
    let process = sandbox.exec(&["true"], &[("KEY".into(), value.into())]).await.expect("it");
    let reports = client.sandboxes(None).await.expect("a list");
    let sandbox_token = format!("token-of-{}", sandbox.id());
    let mut secrets = vec![value.to_owned(), token_secret.to_owned(), sandbox_token];
    for call in stand_in.log() {
        let is_token = |name: &str| ["x-modal-auth-token", "authorization"].contains(&name);
        let tokens = call.metadata.into_iter().filter(|(name, _)| is_token(name));
        secrets.extend(tokens.map(|(_, token)| token.trim_start_matches("Bearer ").to_owned()));
    }
    assert!(secrets.len() > 5, "no tokens were seen");
    let shown: [(&str, &dyn Debug); 8] = [
        ("config", &config(&stand_in)),
        ("options", &options),
        ("spec", &spec),
        ("backend", &backend),
        ("client", &client),
        ("sandbox", &sandbox),
        ("process", &process),
        ("reports", &reports),
    ];
    for (what, shown) in shown {
        for shown in [format!("{shown:?}"), format!("{shown:#?}")] {
            assert!(!shown.is_empty());
            let leak = secrets.iter().find(|secret| shown.contains(secret.as_str()));
            assert_eq!(leak, None, "{what}: {shown}");
        }
    }
    sandbox.terminate().await.expect("its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_never_travels_in_plain_text_to_another_machine() {
    let stand_in = stand_in().await;
    for (urls, part) in [
        (vec!["http://192.0.2.1:1"], "http:// would show the token"),
        (vec!["https://127.0.0.1:1", "http://example.invalid"], "http:// would show the token"),
        (vec!["http://localhost.example.invalid"], "http:// would show the token"),
        (vec!["https://somebody:secret@192.0.2.1"], "no user name"),
        (vec!["192.0.2.1:1"], "https://HOST"),
    ] {
        let server_urls = urls.iter().map(|&url| url.to_owned()).collect();
        let config = ModalConfig { server_urls, ..config(&stand_in) };
        let error = ModalClient::connect(config).await.expect_err("refused").to_string();
        assert!(error.starts_with("server_urls") && error.contains(part), "{urls:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_comes_to_nothing_shows_the_end_of_its_log() {
    for (faults, build_timeout, parts) in [
        (vec![], Duration::from_secs(1), ["modal.build_timeout", "a first step"]),
        (
            // What was heard stays heard when the log breaks off, and then is refused.
            vec![Fault::Mid { after_bytes: 1 }, Fault::Before(Code::NotFound)],
            Duration::from_secs(60),
            ["isn't there", "the end of its log:\n  => "],
        ),
    ] {
        let stand_in = stand_in().await;
        let commands = ["RUN echo a first step; sleep 3"];
        let image = ModalImage::default().dockerfile_commands(commands);
        // The layer below is there, so that the faults hit the one that is slow.
        crate::backend(&stand_in).await;
        for fault in faults {
            stand_in.fault("ImageJoinStreaming", fault);
        }
        let options = ModalOptions { image, build_timeout, ..ModalOptions::default() };
        let error = ModalBackend::connect(config(&stand_in), options, &|_| {}).await;
        let error = error.expect_err("there is no image").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains("Aborted"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_holds_no_question_is_not_stormed() {
    let options = StandInOptions { holds: false, ..StandInOptions::default() };
    let stand_in = StandIn::start(options).await;
    let image = ModalImage::default().dockerfile_commands(["RUN sleep 2"]);
    let options = ModalOptions { image, ..ModalOptions::default() };
    let backend = ModalBackend::connect(config(&stand_in), options, &|_| {}).await.expect("it");
    let asked = stand_in.calls("ImageJoinStreaming");
    assert!((2..=6).contains(&asked), "{asked} questions about two layers");
    let session = backend.open(EnvironmentOptions::default()).await.expect("a session");
    let before = stand_in.calls("SandboxWaitV2");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let asked = stand_in.calls("SandboxWaitV2") - before;
    assert!((1..=4).contains(&asked), "{asked} questions about a sandbox");
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_watched_on_after_an_outage() {
    let stand_in = stand_in().await;
    let mut session = session(&stand_in).await;
    session.execute("1").await.expect("a cell");
    stand_in.refuse_connections(true);
    stand_in.cut_connections();
    // Longer than the tries of one call take.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let before = stand_in.calls("SandboxWaitV2");
    stand_in.refuse_connections(false);
    let since = std::time::Instant::now();
    while stand_in.calls("SandboxWaitV2") == before {
        assert!(since.elapsed() < Duration::from_secs(10), "nobody watches");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    session.execute("2").await.expect("another cell");
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ended_before_its_time_is_replaced() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let mut session = session(&stand_in).await;
    session.execute("1").await.expect("a cell");
    let asked = stand_in.calls("AuthTokenGet");
    stand_in.revoke_tokens();
    assert_eq!(client.sandboxes(None).await.expect("a list").len(), 1);
    assert_eq!(stand_in.calls("AuthTokenGet"), asked + 1);
    session.execute("2").await.expect("another cell");
    session.close().await.expect("the end");
    // A call that is refused with the new one, too, is refused.
    for _ in 0..2 {
        stand_in.fault("SandboxListV2", Fault::Unauthenticated);
    }
    let error = client.sandboxes(None).await.expect_err("refused").to_string();
    assert!(error.contains("refused the token"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_on_with_the_old_token_while_the_next_is_asked_for() {
    let token_life = Duration::from_secs(8);
    let stand_in = StandIn::start(StandInOptions { token_life, ..StandInOptions::default() }).await;
    let client = client(&stand_in).await;
    // Past 60 % of its life.
    tokio::time::sleep(Duration::from_secs(5)).await;
    stand_in.fault("AuthTokenGet", Fault::Delay(Duration::from_secs(30)));
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.sandboxes(None).await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let others = (0..8).map(|_| client.sandboxes(None));
    let others =
        tokio::time::timeout(Duration::from_millis(1500), futures_util::future::join_all(others));
    let others = others.await.expect("they don't wait");
    assert!(others.iter().all(Result::is_ok) && !first.is_finished());
    first.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_does_not_tell_the_worker_is_asked_after() {
    for tells_router in [true, false] {
        let options = StandInOptions { tells_router, record: true, ..StandInOptions::default() };
        let stand_in = StandIn::start(options).await;
        let client = client(&stand_in).await;
        let sandbox = client.create_sandbox(&SandboxSpec::default(), &|_| {}).await.expect("it");
        let asked = stand_in.calls("SandboxGetCommandRouterAccess");
        assert_eq!(asked, usize::from(!tells_router));
        // The worker refuses the pass: another is asked for, too.
        stand_in.fault("TaskExecStart", Fault::Unauthenticated);
        sandbox.exec(&["true"], &[]).await.expect("a process").wait().await.expect("its end");
        sandbox.terminate().await.expect("its end");
        let token = format!("token-of-{}", sandbox.id());
        let mut seen = 0;
        for call in stand_in.log() {
            if !["SandboxGetCommandRouterAccess", "SandboxTerminateV2"].contains(&&*call.rpc) {
                continue;
            }
            let is_it = |(name, value): &(String, String)| {
                name == "x-modal-sandbox-token" && *value == token
            };
            assert!(call.metadata.iter().any(is_it), "{}: {:?}", call.rpc, call.metadata);
            seen += 1;
        }
        assert_eq!(seen, asked + 2);
        assert_eq!(crate::running(&stand_in), 0);
    }
    // Without one, nothing is left.
    let options = StandInOptions { tells_router: false, ..StandInOptions::default() };
    let stand_in = StandIn::start(options).await;
    let client = client(&stand_in).await;
    stand_in.fault("SandboxGetCommandRouterAccess", Fault::Before(Code::PermissionDenied));
    let made = client.create_sandbox(&SandboxSpec::default(), &|_| {}).await;
    made.expect_err("it can't be reached");
    crate::all_ended(&stand_in).await;
}
