//! What sessions in sandboxes have of their own: who runs the cells, what is left of them, large things.

use std::sync::Arc;

use kaa::lm::ScriptedHandler;
use kaa::modal::{ModalBackend, ModalClient, ModalOptions};
use kaa::{Backend, Context, EnvironmentExt, EnvironmentOptions, Outcome};

use crate::cloud::{StandIn, StandInOptions};
use crate::{all_ended, backend, client, config, running, session, stand_in};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_a_session_that_was_closed_or_dropped() {
    let stand_in = stand_in().await;
    session(&stand_in).await.close().await.expect("the end");
    assert_eq!(running(&stand_in), 0);
    drop(session(&stand_in).await);
    all_ended(&stand_in).await;
    let mut busy = session(&stand_in).await;
    let cell = busy.execute("import time; time.sleep(60)");
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), cell).await.is_err());
    drop(busy);
    all_ended(&stand_in).await;
    // An opening that nobody waits for any more.
    let backend = backend(&stand_in).await;
    for millis in [0, 1, 5, 20, 60, 150] {
        let opening = backend.open(EnvironmentOptions::default());
        drop(tokio::time::timeout(std::time::Duration::from_millis(millis), opening).await);
    }
    all_ended(&stand_in).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_are_marked_listed_and_ended_by_name() {
    let stand_in = stand_in().await;
    let session = session(&stand_in).await;
    let client = client(&stand_in).await;
    let found = client.sandboxes(Some("kaa")).await.expect("a list");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].has_owner, Some(true));
    assert!(found[0].tags.iter().any(|(name, _)| name == "kaa-session"));
    let sandbox = &stand_in.sandboxes()[0];
    assert_eq!(sandbox.definition.timeout_secs, ModalOptions::default().timeout.as_secs() as u32);
    client.terminate(&found[0].id).await.expect("its end");
    assert_eq!(running(&stand_in), 0);
    assert!(client.sandboxes(None).await.expect("a list").is_empty());
    session.close().await.expect("what has ended can be ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_contexts_and_outputs_get_across_whole() {
    let stand_in = stand_in().await;
    let mut session = session(&stand_in).await;
    let text = "0123456789abcde\n".repeat(100 << 16);
    session.add_context(Context::Text(text.clone().into_bytes()), None).await.expect("100 MiB");
    let code = "import hashlib; print(len(context), hashlib.sha256(context.encode()).hexdigest())";
    let cell = session.execute(code).await.expect("a cell");
    let digest = <sha2::Sha256 as sha2::Digest>::digest(&text);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(cell.stdout.text(), format!("{} {digest}\n", text.len()));
    let value = session.get_variable("context").await.expect("it comes back").expect("it is there");
    assert!(value == kaa::Value::Str(text));
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_called_over_the_same_streams_in_parallel() {
    let stand_in = stand_in().await;
    let lm = Arc::new(ScriptedHandler::echo());
    let options = EnvironmentOptions { lm: Some(lm), ..EnvironmentOptions::default() };
    let mut session = backend(&stand_in).await.open(options).await.expect("a session");
    let code = "from concurrent.futures import ThreadPoolExecutor\n\
                with ThreadPoolExecutor(8) as pool:\n    answers = list(pool.map(llm_query, map(str, range(40))))\n\
                print(len(answers), len(set(answers)))";
    let cell = session.execute(code).await.expect("a cell");
    assert_eq!(cell.stdout.text(), "40 40\n", "{}", cell.stderr.text());
    assert_eq!(cell.lm_calls.len(), 40);
    session.close().await.expect("the end");
}

/// Whether this user may become another one, as Modal's sandboxes may.
fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn cells_are_nobody_and_can_not_reach_their_supervisor() {
    let stand_in = stand_in().await;
    // One that every user can read, if this machine has it.
    let python = "/usr/bin/python3";
    let is_there = is_root() && std::fs::exists(python).expect("a path");
    let python = if is_there { python.into() } else { ModalOptions::default().python };
    let options = ModalOptions { python, ..ModalOptions::default() };
    let backend = ModalBackend::connect(config(&stand_in), options, &|_| {}).await.expect("it");
    let mut session = backend.open(EnvironmentOptions::default()).await.expect("a session");
    let code = "import os\n\
                print(os.getuid(), os.getgid(), os.getgroups())\n\
                for path in ('mem', 'environ', 'fd'):\n    \
                try:\n        open(f'/proc/{os.getppid()}/{path}', 'rb') if path != 'fd' else os.listdir(f'/proc/{os.getppid()}/fd')\n        \
                print('open', path)\n    \
                except OSError as error:\n        print(type(error).__name__)\n\
                try:\n    os.kill(os.getppid(), 0)\n    print('can signal')\n\
                except OSError as error:\n    print(type(error).__name__)\n\
                with open('here.txt', 'w') as file:\n    print(file.write('own directory'))";
    let cell = session.execute(code).await.expect("a cell");
    assert_eq!(cell.outcome, Outcome::Completed, "{}", cell.stderr.text());
    if is_there {
        let refused = "PermissionError\n".repeat(4);
        assert_eq!(cell.stdout.text(), format!("65534 65534 []\n{refused}13\n"));
    } else {
        assert!(cell.stdout.text().ends_with("13\n"), "{}", cell.stdout.text());
    }
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_end_are_replaced_while_sessions_live() {
    let token_life = std::time::Duration::from_secs(2);
    let stand_in = StandIn::start(StandInOptions { token_life, ..StandInOptions::default() }).await;
    let client = ModalClient::connect(config(&stand_in)).await.expect("a client");
    let mut session = session(&stand_in).await;
    for _ in 0..6 {
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        session.execute("1").await.expect("a cell");
        client.sandboxes(None).await.expect("a list");
    }
    session.close().await.expect("the end");
    assert!(stand_in.calls("AuthTokenGet") >= 3);
}
