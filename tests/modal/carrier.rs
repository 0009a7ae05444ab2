//! Model calls by the second way: a broker in the sandbox, which the host asks through a tunnel.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use async_trait::async_trait;
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest};
use kaa::modal::{Carrier, ModalBackend, ModalOptions};
use kaa::{
    Backend, Environment, EnvironmentExt, EnvironmentOptions, ExecuteOptions, Limits, Outcome,
    Status,
};

use crate::cloud::{GenericStatus, StandIn};
use crate::{all_ended, config, stand_in};

/// Echoes, after as many milliseconds as the prompt begins with; it counts what it is asked.
#[derive(Default)]
struct Slow(AtomicUsize);

#[async_trait]
impl LmHandler for Slow {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        self.0.fetch_add(1, SeqCst);
        let text = request.prompt.to_text().into_owned();
        let millis = text.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        Ok(LmCompletion { response: text, ..LmCompletion::default() })
    }
}

async fn open(stand_in: &StandIn) -> (Box<dyn Environment>, Arc<Slow>) {
    let options =
        ModalOptions { carrier: Carrier::Broker { port: 8080 }, ..ModalOptions::default() };
    let backend = ModalBackend::connect(config(stand_in), options, &|_| {}).await.expect("it");
    let lm = Arc::new(Slow::default());
    let limits = Limits { lm_calls: 1000, ..Limits::default() };
    let lm_handler = Some(lm.clone() as Arc<dyn LmHandler>);
    let options = EnvironmentOptions { lm: lm_handler, limits, ..EnvironmentOptions::default() };
    (backend.open(options).await.expect("a session"), lm)
}

async fn printed(session: &mut Box<dyn Environment>, code: &str) -> String {
    let cell = session.execute(code).await.expect("a cell");
    assert_eq!(cell.outcome, Outcome::Completed, "{}", cell.stderr.text());
    cell.stdout.text().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_gets_out_but_answers_get_in() {
    let stand_in = stand_in().await;
    let (mut session, lm) = open(&stand_in).await;
    let definition = stand_in.sandboxes()[0].definition.clone();
    let network = definition.network_access.expect("a network");
    // An allowlist, see `NetworkAccess` in Modal's protocol.
    assert_eq!((network.network_access_type, network.allowed_cidrs.len()), (3, 0));
    let code = "from concurrent.futures import ThreadPoolExecutor as Pool\n\
                with Pool(8) as pool: answers = list(pool.map(llm_query, map(str, range(40))))\n\
                print(len(set(answers)), llm_query_batched(['a', 'b']), len(llm_query('x' * 20_000_000)))";
    assert_eq!(printed(&mut session, code).await, "40 ['a', 'b'] 20000000\n");
    assert_eq!(lm.0.load(SeqCst), 43);
    // More than the broker takes at a time wait for their turn.
    let code = "import threading; threading.stack_size(1 << 18)\n\
                with Pool(400) as pool: answers = list(pool.map(lambda n: llm_query(f'1500 {n}'), range(400)))\n\
                print(answers == [f'1500 {n}' for n in range(400)])";
    assert_eq!(printed(&mut session, code).await, "True\n");
    // Strangers in the sandbox have no token.
    let code = "import urllib.request\n\
                print(urllib.request.urlopen('http://127.0.0.1:8080/health').status)\n\
                try: urllib.request.urlopen('http://127.0.0.1:8080/pending')\n\
                except Exception as error: print(error.code)";
    assert_eq!(printed(&mut session, code).await, "200\n401\n");
    session.close().await.expect("the end");
    all_ended(&stand_in).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_connection_is_lost_is_asked_once() {
    let stand_in = stand_in().await;
    let (mut session, lm) = open(&stand_in).await;
    let cutting = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            stand_in.cut_connections();
        }
    };
    let (text, ()) = tokio::join!(printed(&mut session, "print(llm_query('2000 a'))"), cutting);
    assert_eq!((text.as_str(), lm.0.load(SeqCst)), ("2000 a\n", 1));
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_that_is_stopped_in_a_call_goes_no_further() {
    let stand_in = stand_in().await;
    let (mut session, _) = open(&stand_in).await;
    session.execute("kept, beyond = 1, False").await.expect("a cell");
    let limits = Limits { wall: Duration::from_secs(1), ..Limits::default() };
    let options = ExecuteOptions { limits: Some(limits) };
    let code = "answer = llm_query('60000 a')\nbeyond = True";
    let cell = session.execute_opts(code, options).await.expect("a cell");
    assert_eq!(cell.outcome, Outcome::LimitReached, "{}", cell.stderr.text());
    let code = "print(kept, beyond, llm_query('0 b'))";
    assert_eq!(printed(&mut session, code).await, "1 False 0 b\n");
    session.close().await.expect("the end");
}

/// Cells can find the guests' token, and say what they like.
#[tokio::test(flavor = "multi_thread")]
async fn forged_calls_are_refused_by_name() {
    let stand_in = stand_in().await;
    let (mut session, lm) = open(&stand_in).await;
    let code = r#"
import base64, gc, json, urllib.error, urllib.request
door = next(found for found in gc.get_objects() if type(found).__name__ == "Door")
token = door.head.split(b"Bearer ")[1].split(b"\r\n")[0].decode()
def post(path, **body):
    request = urllib.request.Request("http://127.0.0.1:8080" + path, json.dumps(body).encode())
    request.add_header("Authorization", "Bearer " + token)
    try:
        return urllib.request.urlopen(request).read().decode()
    except urllib.error.HTTPError as error:
        return str(error.code)
def frame(data, worker=door.worker):
    answer = json.loads(post("/enqueue", type="frame", worker=worker, frame=base64.b64encode(data).decode()))
    return base64.b64decode(answer["frame"])[4:].decode() if "frame" in answer else answer["error"]
def message(text):
    return len(text).to_bytes(4, "big") + text
print(post("/pending", wait=0), post("/respond", id="a", response={}))
print(frame(message(b'{"op":"done"}')))
print(frame(message(b'{"op":"next"}')))
print(frame(b"\xff\xff\xff\xff"))
print(frame(b"L60000 a", worker=7))
print(post("/enqueue", type="frame", worker=1, frame="?"))
print(post("/enqueue", type="single", prompt="a"))
print(llm_query("0 b"))
"#;
    let said = printed(&mut session, code).await;
    let lines: Vec<&str> = said.lines().collect();
    for (line, part) in lines.iter().zip([
        "403 403",
        "only calls of language models",
        "only calls of language models",
        "error",
        "the worker is gone",
        "not base64",
        "no call of a session",
        "0 b",
    ]) {
        assert!(line.contains(part), "{part:?}: {said}");
    }
    assert_eq!((lines.len(), lm.0.load(SeqCst)), (8, 1), "{said}");
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_that_died_has_asked_costs_nothing() {
    let stand_in = stand_in().await;
    let (mut session, lm) = open(&stand_in).await;
    let code = "import os, threading, time\n\
                for n in range(4): threading.Thread(target=llm_query, args=(f'60000 {n}',)).start()\n\
                time.sleep(0.5)\nos._exit(3)";
    let cell = session.execute(code).await.expect("a cell");
    assert_ne!(cell.outcome, Outcome::Completed);
    let before = lm.0.load(SeqCst);
    session.reset().await.expect("another worker");
    assert_eq!(printed(&mut session, "print(llm_query('0 b'))").await, "0 b\n");
    assert_eq!(lm.0.load(SeqCst), before + 1);
    session.close().await.expect("the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_ends_under_it_says_why() {
    for (status, part) in [
        (GenericStatus::Timeout, "modal.timeout"),
        (GenericStatus::KernelOomKill, "limits.memory_bytes"),
    ] {
        let stand_in = stand_in().await;
        let (mut session, _) = open(&stand_in).await;
        let id = stand_in.sandboxes()[0].id.clone();
        let ending = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            stand_in.end_sandbox(&id, status);
        };
        let (error, ()) = tokio::join!(session.execute("llm_query('60000 a')"), ending);
        let error = error.expect_err("its sandbox is gone");
        assert!(error.poisons() && error.to_string().contains(part), "{status:?}: {error}");
        session.close().await.expect("the end");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_ends_ends_the_session_with_its_reason() {
    let stand_in = stand_in().await;
    let (mut session, _) = open(&stand_in).await;
    let is_broker = |pid: &&i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("/enqueue")
    };
    let pids = stand_in.sandboxes()[0].pids.clone();
    let pid = pids.iter().find(is_broker).expect("a broker").to_string();
    let killed = std::process::Command::new("kill").args(["-9", &pid]).status().expect("kill");
    assert!(killed.success());
    let error = session.execute("llm_query('0 a')").await.expect_err("there is no broker");
    assert!(error.poisons(), "{error}");
    assert!(
        error.to_string().contains("the broker in the Modal sandbox ended: signal 9"),
        "{error}"
    );
    assert_eq!(session.status(), Status::Poisoned);
    session.reset().await.expect("another sandbox");
    assert_eq!(printed(&mut session, "print(llm_query('0 b'))").await, "0 b\n");
    session.close().await.expect("the end");
}
