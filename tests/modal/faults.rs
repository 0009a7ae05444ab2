//! Whatever breaks on the way, a cell runs once, and its output is complete.

use std::time::Duration;

use kaa::modal::{ModalBackend, ModalOptions, ProcessExit, SandboxSpec};
use kaa::{Backend, Context, Environment, EnvironmentExt, EnvironmentOptions, Outcome};
use tonic::Code;

use crate::cloud::{Fault, StandIn, StandInOptions};
use crate::{config, stand_in};

/// Prints more than fits into one message, and counts how often it ran.
const CELL: &str = "runs = globals().get('runs', 0) + 1\nprint('x' * 300_000)\nprint('ran', runs)";

fn expected() -> String {
    format!("{}\nran 1\n", "x".repeat(300_000))
}

/// Opens a session and runs the cell, with these faults on the way.
async fn runs_once(stand_in: &StandIn, when: &str) {
    let backend = ModalBackend::connect(config(stand_in), ModalOptions::default(), &|_| {}).await;
    let backend = backend.unwrap_or_else(|error| panic!("{when}: {error}"));
    let options = EnvironmentOptions::default();
    let session = backend.open(options).await;
    let mut session = session.unwrap_or_else(|error| panic!("{when}: {error}"));
    let cell = session.execute(CELL).await.unwrap_or_else(|error| panic!("{when}: {error}"));
    assert_eq!(cell.outcome, Outcome::Completed, "{when}: {}", cell.stderr.text());
    assert!(cell.stdout.text() == expected(), "{when}: {} bytes", cell.stdout.text().len());
    let sandboxes = stand_in.sandboxes();
    assert_eq!(sandboxes.len(), 1, "{when}: more than one sandbox was made");
    session.close().await.unwrap_or_else(|error| panic!("{when}: {error}"));
    assert_eq!(crate::running(stand_in), 0, "{when}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_may_fail_before_or_after_it_was_done() {
    for rpc in [
        "AuthTokenGet",
        "AppGetOrCreate",
        "EnvironmentGetOrCreate",
        "ImageGetOrCreate",
        "ImageJoinStreaming",
        "SandboxCreateV2",
        "TaskExecStart",
        "TaskExecStdinWriteStream",
        "TaskExecStdioRead",
        "SandboxTerminateV2",
    ] {
        for fault in [
            Fault::Before(Code::Unavailable),
            Fault::After(Code::Unavailable),
            Fault::Before(Code::Internal),
            Fault::Throttle(0.2),
        ] {
            // What is throttled or lost on a long call is a call that breaks: `Mid` below.
            let is_stream = rpc.starts_with("TaskExecStd") || rpc == "ImageJoinStreaming";
            if is_stream && !matches!(fault, Fault::Before(_)) {
                continue;
            }
            let stand_in = stand_in().await;
            stand_in.fault(rpc, fault.clone());
            runs_once(&stand_in, &format!("{rpc} {fault:?}")).await;
            assert!(stand_in.calls(rpc) >= 2, "{rpc} {fault:?} was not met");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_calls_may_break_at_any_byte() {
    for (rpc, places) in [
        ("TaskExecStdinWriteStream", &[0, 1, 1000, 60_000][..]),
        ("TaskExecStdioRead", &[0, 1, 1000, 200_000]),
    ] {
        for after_bytes in places {
            let stand_in = stand_in().await;
            for _ in 0..3 {
                stand_in.fault(rpc, Fault::Mid { after_bytes: *after_bytes });
            }
            runs_once(&stand_in, &format!("{rpc} after {after_bytes} bytes")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_is_refused_is_replaced() {
    for rpc in ["TaskExecStart", "TaskExecStdinWriteStream", "TaskExecStdioRead"] {
        let stand_in = stand_in().await;
        stand_in.fault(rpc, Fault::Unauthenticated);
        runs_once(&stand_in, rpc).await;
        assert!(stand_in.calls("SandboxGetCommandRouterAccess") >= 1, "{rpc}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_without_the_long_call_get_calls_of_their_own() {
    let options = StandInOptions { stdin_streams: false, ..StandInOptions::default() };
    let stand_in = StandIn::start(options).await;
    for fault in [Fault::After(Code::Unavailable), Fault::Before(Code::Unknown)] {
        stand_in.fault("TaskExecStdinWrite", fault);
    }
    runs_once(&stand_in, "calls").await;
    assert!(stand_in.calls("TaskExecStdinWrite") >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_lost_in_the_middle_of_a_cell_costs_nothing() {
    let stand_in = stand_in().await;
    let mut session = crate::session(&stand_in).await;
    let code = "import time\nruns = globals().get('runs', 0) + 1\n\
                for step in range(10):\n    print(step, 'y' * 1000)\n    time.sleep(0.1)\nprint('ran', runs)";
    let cutting = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            stand_in.cut_connections();
        }
    };
    let (cell, ()) = tokio::join!(session.execute(code), cutting);
    let cell = cell.expect("the cell");
    let expected: String = (0..10).map(|step| format!("{step} {}\n", "y".repeat(1000))).collect();
    assert!(cell.stdout.text() == format!("{expected}ran 1\n"), "{}", cell.stdout.text().len());
    let next = session.execute("runs").await.expect("another cell");
    assert_eq!(next.value.as_deref(), Some("1"));
    session.close().await.expect("the end");
}

/// A session that gives a lost network so many seconds.
async fn patient(stand_in: &StandIn, seconds: u64) -> Box<dyn Environment> {
    let patience = Duration::from_secs(seconds);
    let options = ModalOptions { patience, ..ModalOptions::default() };
    let backend = ModalBackend::connect(config(stand_in), options, &|_| {}).await.expect("it");
    backend.open(EnvironmentOptions::default()).await.expect("a session")
}

/// The time that a large context takes isn't taken from it.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_lost_under_a_context_costs_nothing() {
    let stand_in = stand_in().await;
    let mut session = crate::session(&stand_in).await;
    let context = Context::Text(vec![b'z'; 30_000_000]);
    let outage = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        stand_in.refuse_connections(true);
        stand_in.cut_connections();
        tokio::time::sleep(Duration::from_secs(33)).await;
        stand_in.refuse_connections(false);
    };
    let (index, ()) = tokio::join!(session.add_context(context, None), outage);
    assert_eq!(index.expect("a context"), 0);
    let cell = session.execute("len(context)").await.expect("a cell");
    assert_eq!(cell.value.as_deref(), Some("30000000"));
    session.close().await.expect("the end");
}

/// Patience begins when something breaks, not when the session does.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_older_than_its_patience_outlives_breaks() {
    let stand_in = stand_in().await;
    let mut session = patient(&stand_in, 2).await;
    session.execute("a = 1").await.expect("a cell");
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(2500)).await;
        stand_in.cut_connections();
    }
    let quiet = "import time\ntime.sleep(6)\nprint('done', a)";
    let cutting = async {
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(2500)).await;
            stand_in.cut_connections();
        }
    };
    let (cell, ()) = tokio::join!(session.execute(quiet), cutting);
    assert_eq!(cell.expect("a quiet cell").stdout.text(), "done 1\n");
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_may_expire_again_and_again_in_a_quiet_session() {
    let stand_in = stand_in().await;
    let mut session = crate::session(&stand_in).await;
    session.execute("a = 1").await.expect("a cell");
    for _ in 0..3 {
        // Both streams, and the control plane is out of reach for a moment as well.
        for _ in 0..2 {
            stand_in.fault("TaskExecStdioRead", Fault::Unauthenticated);
        }
        for _ in 0..4 {
            let fault = Fault::Before(Code::Unavailable);
            stand_in.fault("SandboxGetCommandRouterAccess", fault);
        }
        stand_in.cut_connections();
        tokio::time::sleep(Duration::from_millis(2500)).await;
    }
    let cell = session.execute("a").await.expect("another cell");
    assert_eq!(cell.value.as_deref(), Some("1"));
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_waited_for_through_an_outage() {
    let stand_in = stand_in().await;
    let client = crate::client(&stand_in).await;
    let sandbox = client.create_sandbox(&SandboxSpec::default(), &|_| {}).await.expect("a sandbox");
    let process = sandbox.exec(&["sh", "-c", "sleep 14; exit 7"], &[]).await.expect("a process");
    let outage = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        stand_in.refuse_connections(true);
        stand_in.cut_connections();
        tokio::time::sleep(Duration::from_secs(12)).await;
        stand_in.refuse_connections(false);
    };
    let (exit, ()) = tokio::join!(process.wait(), outage);
    assert_eq!(exit.expect("how it ended"), ProcessExit::Code(7));
    sandbox.terminate().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_stays_away_ends_the_session_with_words() {
    let stand_in = stand_in().await;
    let mut session = patient(&stand_in, 1).await;
    stand_in.refuse_connections(true);
    stand_in.cut_connections();
    let error = session.execute("1").await.expect_err("there is no network");
    assert!(error.poisons() && error.to_string().contains("connection"), "{error}");
    stand_in.refuse_connections(false);
    session.reset().await.expect("another sandbox");
    let cell = session.execute("2").await.expect("a cell");
    assert_eq!(cell.value.as_deref(), Some("2"));
    session.close().await.expect("the end");
}
