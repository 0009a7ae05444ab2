//! Kaa and the Python package `rlms` over the LM handler protocol, in both directions.
//!
//! The failure guarded against: both sides of Kaa agree with each other and with the goldens, but
//! not with the RLM that people run. The package is installed by pip on the first run, without the
//! clients of model providers, which nothing here needs.

mod common;
#[path = "common/packages.rs"]
mod packages;
#[path = "common/required.rs"]
mod required;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest, LmServer, LmServerOptions};
use kaa::lm::{ModelUsage, Prompt, SocketHandler};
use kaa::{
    Backend, Context, EnvironmentExt, EnvironmentOptions, Error, LocalBackend, LocalOptions,
    Outcome, Policy, Status,
};
use libtest_mimic::{Arguments, Trial};
use regex::Regex;
use serde_json::{Value as Json, json};

const SUITE: &str = "interop";

/// The package, and what of its dependencies its environments import.
const PACKAGES: &[&str] = &[
    "rlms==0.1.3",
    "python-dotenv==1.2.1",
    "rich==14.2.0",
    "markdown-it-py==4.0.0",
    "mdurl==0.1.2",
    "Pygments==2.19.2",
    "dill==0.4.0",
];
const PYTHONS: &[&str] = &["python3", "python", "python3.14", "python3.13", "python3.12"];
const IS_NEW_ENOUGH: &str = "import sys; sys.exit(sys.version_info < (3, 11))";

/// A Python that can import RLM.
struct Rlm {
    python: &'static str,
    packages: PathBuf,
}

impl Rlm {
    fn script(&self, name: &str) -> Command {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
        let mut command = Command::new(self.python);
        command.arg(scripts.join(name)).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.env("PYTHONPATH", &self.packages).env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }
}

/// Installs RLM unless an earlier run did.
fn rlm() -> &'static Result<Rlm, String> {
    static RLM: OnceLock<Result<Rlm, String>> = OnceLock::new();
    RLM.get_or_init(|| {
        let is_new_enough = |python: &&&str| {
            let mut command = Command::new(python);
            command.args(["-c", IS_NEW_ENOUGH]).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let python =
            PYTHONS.iter().find(is_new_enough).ok_or("there is no Python 3.11 or newer")?;
        let packages = packages::installed(python, PACKAGES)?;
        Ok(Rlm { python, packages })
    })
}

fn main() -> ExitCode {
    let trial = |name, test: fn(&Rlm)| {
        required::trial(SUITE, name, rlm, move |rlm| {
            test(rlm);
            Ok(())
        })
    };
    let trials: Vec<Trial> = vec![
        trial("rlms_clients_ask_kaas_server", rlms_clients_ask_kaas_server),
        trial("kaas_session_asks_rlms_handler", kaas_session_asks_rlms_handler),
        trial("both_servers_send_the_same_bytes", both_servers_send_the_same_bytes),
        trial("a_process_saves_what_dill_loads", a_process_saves_what_dill_loads),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// What `rlm_server.py` answers with.
struct Mock;

#[async_trait]
impl LmHandler for Mock {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let text = match &request.prompt {
            Prompt::Text(text) => text,
            Prompt::Messages(json) => json.as_array().unwrap().last().unwrap()["content"]
                .as_str()
                .expect("the tests' messages have text"),
        };
        if text == "boom" {
            return Err(LmError::new("kaput"));
        }
        let own = match (request.model.as_deref(), request.depth) {
            (Some("third"), _) => "third",
            (_, 1) => "second",
            _ => "default",
        };
        let model = request.model.clone().unwrap_or_else(|| own.into());
        let response = format!("{own} heard {text}");
        let (calls, input_tokens, output_tokens) = (1, 2, 3);
        let name = model.clone();
        let usage = ModelUsage { model: name, calls, input_tokens, output_tokens, cost: None };
        Ok(LmCompletion { model, response, usage: vec![usage], ..LmCompletion::default() })
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(future)
}

/// Runs `ask` while Kaa's server answers; `ask` blocks.
fn with_kaas_server<T: Send + 'static>(ask: impl FnOnce(SocketAddr) -> T + Send + 'static) -> T {
    block_on(async {
        let options = LmServerOptions::default();
        let server = LmServer::bind("127.0.0.1:0", Arc::new(Mock), options).await.unwrap();
        let address = server.local_addr();
        let (done, is_done) = tokio::sync::oneshot::channel();
        let asking = tokio::task::spawn_blocking(move || {
            let result = ask(address);
            drop(done);
            result
        });
        server.serve(async { drop::<Result<(), _>>(is_done.await) }).await;
        asking.await.unwrap()
    })
}

/// RLM's server; dropping it ends it.
struct RlmServer {
    child: Child,
    address: SocketAddr,
}

impl RlmServer {
    fn start(rlm: &Rlm) -> Self {
        let mut child = rlm.script("rlm_server.py").spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port: u16 = line.trim().parse().expect("a port; its stderr says why there is none");
        Self { child, address: SocketAddr::from(([127, 0, 0, 1], port)) }
    }
}

impl Drop for RlmServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn rlms_clients_ask_kaas_server(rlm: &Rlm) {
    let mut script = rlm.script("rlm_client.py");
    let result: Json = with_kaas_server(move |address| {
        let mut child = script.spawn().unwrap();
        let plan = json!({
            "host": address.ip(), "port": address.port(),
            "cells": [
                "print(llm_query('caf\u{e9} \u{1f600} \\x00\\ud83d'))",
                "print(llm_query_batched(['a', 'boom', '\u{e9}'], model='third'))",
                "print(llm_query('boom'), llm_query(''))",
                "print(llm_query([{'role': 'user', 'content': 'chat'}], model='nope'))",
                "print(rlm_query('r'), rlm_query_batched(['s', 't']))",
            ],
            "requests": [
                { "prompt": "x", "model": "nope", "depth": 2 },
                { "prompt": "boom", "depth": 0 },
                { "depth": 0 },
            ],
            "batches": [["a", "boom", [{ "role": "user", "content": "chat" }]], [""]],
        });
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(plan.to_string().as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    });
    let printed: Vec<&str> =
        result["cells"].as_array().unwrap().iter().map(|c| c["stdout"].as_str().unwrap()).collect();
    let missing = "Missing 'prompt' or 'prompts' in request.";
    assert_eq!(
        printed,
        [
            "second heard caf\u{e9} \u{1f600} \0\u{fffd}\n",
            "['third heard a', 'Error: llm() call failed - kaput', 'third heard \u{e9}']\n",
            &format!("Error: kaput Error: {missing}\n"),
            "second heard chat\n",
            "second heard r ['second heard s', 'second heard t']\n",
        ],
        "{result}"
    );
    let calls = &result["cells"][1]["rlm_calls"];
    assert_eq!(calls.as_array().unwrap().len(), 2, "{calls}");
    assert_eq!(calls[1]["root_model"], "third");
    let usage = json!({"total_calls": 1, "total_input_tokens": 2, "total_output_tokens": 3});
    assert_eq!(calls[1]["usage_summary"], json!({"model_usage_summaries": {"third": usage}}));

    let answer = &result["requests"][0]["chat_completion"];
    assert_eq!(
        (&answer["response"], &answer["root_model"]),
        (&json!("default heard x"), &json!("nope"))
    );
    assert_eq!(result["requests"][1]["error"], "kaput");
    assert_eq!(result["requests"][2]["error"], missing);
    let batch = &result["batches"][0];
    assert_eq!(batch[0]["chat_completion"]["response"], "default heard a");
    assert_eq!(batch[1]["error"], "llm() call failed - kaput");
    assert_eq!(batch[2]["chat_completion"]["response"], "default heard chat");
    assert_eq!(result["batches"][1][0]["chat_completion"]["response"], "default heard ");
}

fn kaas_session_asks_rlms_handler(rlm: &Rlm) {
    let server = RlmServer::start(rlm);
    let handler = SocketHandler::new(server.address.to_string()).unwrap();
    let options = |depth| EnvironmentOptions {
        lm: Some(Arc::new(handler.clone())),
        depth,
        ..EnvironmentOptions::default()
    };
    block_on(async {
        let mut session = common::open(options(0));
        for (code, expected) in [
            ("llm_query('caf\u{e9} \u{1f600} \\x00')", "second heard caf\u{e9} \u{1f600} \0"),
            (
                "llm_query_batched(['a', 'boom', '\u{e9}'])",
                "['second heard a', 'Error: llm() call failed - kaput', 'second heard \u{e9}']",
            ),
            ("llm_query('boom')", "Error: kaput"),
            ("llm_query('a', model='third')", "third heard a"),
            ("llm_query('a', model='nope')", "second heard a"),
            ("llm_query([{'role': 'user', 'content': 'chat'}])", "second heard chat"),
            ("llm_query_batched([])", "[]"),
            ("rlm_query('r')", "second heard r"),
        ] {
            let printed = common::print(&mut session, &format!("print({code})")).await;
            assert_eq!(printed, format!("{expected}\n"), "{code}");
        }
        let cell = common::run(&mut session, "llm_query('a', model='nope')").await;
        let answer = &cell.lm_calls[0].completion;
        assert_eq!((&*answer.model, answer.usage[0].output_tokens), ("nope", 3));
        let mut deeper = common::open(options(1));
        let printed = common::print(&mut deeper, "print(llm_query('a'))").await;
        assert_eq!(printed, "default heard a\n");
    });
}

fn both_servers_send_the_same_bytes(rlm: &Rlm) {
    let theirs = RlmServer::start(rlm);
    let payloads: Vec<Vec<u8>> = [
        r#"{"prompt": "hi", "depth": 0}"#,
        r#"{"prompt": "hi", "depth": 1}"#,
        r#"{"prompt": "hi", "model": "nope", "depth": 2, "new": {"a": [1]}}"#,
        r#"{"prompt": "hi", "model": "", "depth": null}"#,
        r#"{"prompt": "caf\u00e9 \ud83d\ude00 \u007f \u0000 \\ \" / \u2028"}"#,
        "{\"prompt\": \"raw caf\u{e9} \u{1f600}\"}",
        r#"{"prompt": [{"content": "chat", "n": [1, 2.0, 1e22, 1.5e-6, 0.1, null, true]}]}"#,
        r#"{"prompts": ["a", "boom", ""], "prompt": "b", "depth": 1}"#,
        r#"{"prompts": ["a", "boom"], "model": "third"}"#,
        r#"{"prompt": "boom"}"#,
        r#"{"prompt": ""}"#,
        r#"{"prompt": [], "prompts": null}"#,
        r#"{"prompts": []}"#,
        "{}",
        "[1]",
        "null",
        "7",
        "",
        "  ",
        "{bad",
        "{\n 'a': 1}",
        "nonsense",
        "\n\t x",
    ]
    .map(Vec::from)
    .into();
    let sent = payloads.clone();
    let ours: Vec<String> = with_kaas_server(move |address| {
        sent.iter().map(|payload| exchange(address, payload)).collect()
    });
    for (payload, ours) in payloads.iter().zip(&ours) {
        let theirs = exchange(theirs.address, payload);
        assert_eq!(*ours, theirs, "{}", String::from_utf8_lossy(payload));
    }
}

/// The payload of the reply, without its times.
fn exchange(address: SocketAddr, payload: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = u32::try_from(payload.len()).unwrap();
    stream.write_all(&[&length.to_be_bytes()[..], payload].concat()).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    assert_eq!(reply.len(), 4 + u32::from_be_bytes(reply[..4].try_into().unwrap()) as usize);
    let time = Regex::new(r#""execution_time": [0-9.e-]+"#).unwrap();
    time.replace_all(str::from_utf8(&reply[4..]).unwrap(), "TIME").into_owned()
}

/// A session in a process saves its variables as RLM's Docker environment keeps them: a dict in a
/// pickle of dill.
fn a_process_saves_what_dill_loads(rlm: &Rlm) {
    const CODE: &str = r#"
import math
def area(r): return math.pi * r * r * scale
class Box:
    def __init__(self, items): self.items = items
scale, items = 2, [1]
box = Box(items)
numbers = (n for n in range(3))
file = open("/dev/null")
"#;
    const CHECK: &str = "import dill, sys\nfound = dill.load(open(sys.argv[1], 'rb'))\nprint(found['items'], found['context'], 'file' in found)";
    let path = std::env::var("PATH").unwrap();
    let python = rlm.python.into();
    let backend = LocalBackend::new(LocalOptions { python, path, ..LocalOptions::default() });
    let packages = rlm.packages.to_str().unwrap().to_owned();
    let policy = Policy { env: vec![("PYTHONPATH".into(), packages)], ..Policy::default() };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.dill");
    block_on(async {
        let options = EnvironmentOptions { policy, ..EnvironmentOptions::default() };
        let mut session = backend.open(options).await.unwrap();
        assert!(session.capabilities().snapshot);
        session.add_context(Context::Text(b"abc".to_vec()), None).await.unwrap();
        let defined = session.execute(CODE).await.unwrap();
        assert_eq!(defined.outcome, Outcome::Completed, "{}", defined.stderr.text());
        let saved = session.snapshot().await.unwrap();
        assert_eq!(saved.unsaved(), ["file", "numbers"]);
        saved.save(&file).unwrap();
        // What is shared stays shared, functions see the session's globals, and contexts go on counting.
        let probe =
            "items.append(2)\nscale = 3\n(box.items, area(1) > 9, context, 'numbers' in globals())";
        let expected = Some("([1, 2], True, 'abc', False)");
        let mut fork = session.fork().await.unwrap();
        assert_eq!(fork.execute(probe).await.unwrap().value.as_deref(), expected);
        assert_eq!(fork.add_context(Context::Text(vec![]), None).await.unwrap(), 1);
        assert_eq!(session.execute("items").await.unwrap().value.as_deref(), Some("[1]"));
        session.execute("import os\nos._exit(1)").await.unwrap();
        assert_eq!(session.status(), Status::Poisoned);
        session.restore(&backend.load_snapshot(&file).unwrap()).await.unwrap();
        assert_eq!(session.execute(probe).await.unwrap().value.as_deref(), expected);
        // A pickle that can't be loaded leaves the session as it was.
        fs::write(&file, b"\x80\x04nonsense").unwrap();
        let refused = session.restore(&backend.load_snapshot(&file).unwrap()).await;
        assert!(matches!(&refused, Err(Error::Invalid { what, .. }) if what == "the snapshot"));
        assert_eq!(session.execute("items").await.unwrap().value.as_deref(), Some("[1, 2]"));
        saved.save(&file).unwrap();
    });
    let mut command = Command::new(rlm.python);
    let output = command.args(["-c", CHECK]).arg(&file).env("PYTHONPATH", &rlm.packages).output();
    assert_eq!(String::from_utf8_lossy(&output.unwrap().stdout), "[1] abc False\n");
    fs::write(&file, "no pickle").unwrap();
    assert!(matches!(backend.load_snapshot(&file), Err(Error::Incompatible { .. })));
}
