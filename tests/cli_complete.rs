//! `kaa complete` as a user meets it: the answer, what it cost, how it ends, what it refuses.
//!
//! The tests need the image `base` in a store: that of `KAA_TEST_CACHE` if it is set, otherwise the
//! user's.

#[path = "common/chat_server.rs"]
mod chat_server;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use chat_server::{ChatOptions, ChatRequest, ChatServer};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value as Json;
use tempfile::TempDir;

/// A root that looks, asks about three pieces and answers; everything else is a sub-model.
const SCRIPT: &str = r#"{
    "model": "scripted",
    "rules": [
        {"contains": "Turn 2/", "response": "```repl\nanswer['content'] = '|'.join(found)\nanswer['ready'] = True\n```"},
        {"regex": "Answer the following: spin", "response": "```repl\nprint('spinning')\nwhile True: pass\n```"},
        {"regex": "Answer the following: fail", "response": "```repl\n1/0\n```"},
        {"regex": "Answer the following: silent", "error": "out of order\nby a server"},
        {"contains": "Turn 1/", "response": "I look.\n```repl\nfound = llm_query_batched([line for line in context.split() if line])\nprint(len(found))\n```"}
    ],
    "default": {"response": "<${prompt}>"}
}"#;

fn here() -> TempDir {
    let here = tempfile::tempdir().unwrap();
    fs::write(here.path().join("s.json"), SCRIPT).unwrap();
    fs::write(here.path().join("c.txt"), "one two three\n").unwrap();
    here
}

fn command(here: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kaa"));
    command.current_dir(here).arg("complete").args(args);
    if let Some(cache) = std::env::var_os("KAA_TEST_CACHE") {
        command.env("KAA_CACHE", cache);
    }
    command.env_remove("OPENAI_API_KEY").stdin(Stdio::null());
    command
}

/// Runs it with the script and the context.
fn scripted(here: &Path, question: &str, args: &[&str]) -> Output {
    let mut all = vec![question, "--context", "c.txt", "--lm-script", "s.json"];
    all.extend(args);
    command(here, &all).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn object(output: &Output) -> Json {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", text(&output.stdout)))
}

#[test]
fn the_answer_goes_to_stdout_and_what_it_cost_to_stderr() {
    let here = here();
    let output = scripted(here.path(), "what?", &["--log-dir", "logs"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "<one>|<two>|<three>\n");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("kaa: 2 turns, 2 cells, 5 calls, "), "{stderr}");
    let log = fs::read_dir(here.path().join("logs")).unwrap().next().unwrap().unwrap();
    let log = fs::read_to_string(log.path()).unwrap();
    let first: Json = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!((&first["type"], &first["root_model"]), (&"metadata".into(), &"scripted".into()));
    assert_eq!(log.lines().count(), 3);

    let quiet = scripted(here.path(), "what?", &["--quiet"]);
    assert_eq!((text(&quiet.stdout), text(&quiet.stderr)), ("<one>|<two>|<three>\n", ""));

    let verbose = scripted(here.path(), "what?", &["--verbose"]);
    let stderr = text(&verbose.stderr);
    assert!(stderr.starts_with("--- model\nI look.\n```repl\n"), "{stderr}");
    assert!(stderr.contains("```\n--- cell\n3\n--- model\n"), "{stderr}");

    let json = scripted(here.path(), "what?", &["--json"]);
    assert_eq!(text(&json.stderr), "");
    let done = object(&json);
    assert_eq!(done["answer"], "<one>|<two>|<three>");
    assert_eq!((&done["ending"], &done["error"]), (&"answered".into(), &Json::Null));
    assert_eq!((&done["turns"], &done["cells"]), (&2.into(), &2.into()));
    assert_eq!(done["usage_summary"]["model_usage_summaries"]["scripted"]["total_calls"], 5);
}

#[test]
fn what_ends_a_run_is_in_the_exit_code_and_in_the_object() {
    let here = here();
    let cases: &[(&str, &[&str], i32, &str, &str)] = &[
        ("spin", &["--max-timeout", "1s"], 124, "timeout", "kaa: Timeout exceeded: 1."),
        ("fail", &["--max-errors", "2"], 124, "errors", "kaa: Error threshold exceeded: 2 consec"),
        ("what?", &["--max-calls", "1"], 124, "calls", "kaa: LM call limit exceeded: 1 + 1 > 1"),
        ("silent", &[], 125, "lm", r"kaa: the model could not be asked: out of order\nby a server"),
    ];
    for (question, args, code, kind, message) in cases {
        let output = scripted(here.path(), question, args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{question}: {stderr}");
        assert!(stderr.lines().any(|line| line.starts_with(message)), "{question}: {stderr}");
        assert_eq!(text(&output.stdout), "");
        let json = scripted(here.path(), question, &[args, &["--json"][..]].concat());
        assert_eq!(json.status.code(), Some(*code));
        let ended = object(&json);
        assert_eq!((&ended["answer"], &ended["error"]["kind"]), (&Json::Null, &(*kind).into()));
        assert!(message.contains(&ended["error"]["message"].as_str().unwrap()[..10]), "{ended}");
    }
    // The last-chance call is answered by the rule of its turn: any text is an answer then.
    let output = scripted(here.path(), "fail", &["--max-iterations", "1"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("the turns ran out"), "{}", text(&output.stderr));
}

#[test]
fn ctrl_c_ends_a_run() {
    let here = here();
    let args = ["spin", "--context", "c.txt", "--lm-script", "s.json", "--verbose"];
    let mut child = command(here.path(), &args).stderr(Stdio::piped()).spawn().unwrap();
    // The model has answered when it's shown; its cell runs then, or soon.
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("while True") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut stderr, &mut line).unwrap() > 0, "it ended");
    }
    std::thread::sleep(Duration::from_millis(100));
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn wrong_usage_is_named() {
    let here = here();
    fs::write(here.path().join("c.json"), "[1]").unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["q"], "no model would answer: give --model, for example --model openai:NAME"),
        (&["q", "--lm-script", "none.json"], "--lm-script: "),
        (
            &["q", "--lm-script", "s.json", "--max-iterations", "0"],
            "--max-iterations: must be at least 1",
        ),
        (&["q", "--lm-script", "s.json", "--max-budget=-1"], "--max-budget: must be a number"),
        (&["q", "--lm-script", "s.json", "--max-depth", "0"], "--max-depth: must be at least 1"),
        (
            &["q", "--lm-script", "s.json", "--max-concurrency", "0"],
            "--max-concurrency: must be betw",
        ),
        (
            &["q", "--lm-script", "s.json", "--system-prompt", "none"],
            "--system-prompt: reading none",
        ),
        (&["q", "--lm-script", "s.json", "--profile", "openenv"], "--profile: the loop speaks the"),
        (
            &["q", "--lm-script", "s.json", "--var", "answer=1"],
            "--var: Custom tools cannot override",
        ),
        (
            &["q", "--lm-script", "s.json", "--context", "c.txt", "--context-json", "c.json"],
            "--context-json: give one context",
        ),
        (
            &["q", "--lm-script", "s.json", "--compaction", "1"],
            "--compaction: must be at least 1000",
        ),
        (&["q", "--model", "openai:x"], "OPENAI_API_KEY is not set"),
    ];
    for (args, message) in cases {
        let output = command(here.path(), args).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(message), "{args:?}: {stderr}");
    }
}

/// The root asks a child, which sees the context of the root as well.
fn delegating(request: &ChatRequest) -> String {
    let text = request.body["messages"].to_string();
    let model = request.body["model"].as_str().unwrap();
    let code = match (model, text.contains("Turn 1/")) {
        ("big", true) if text.contains("Answer the following") => {
            "answer['content'] = rlm_query('child') + f' of {limit}'"
        }
        ("big", true) => "answer['content'] = llm_query(context_1.strip())",
        _ => return format!("{model} read {}", request.prompt()),
    };
    format!("```repl\n{code}\nanswer['ready'] = True\n```")
}

#[test]
fn children_prices_and_sessions_that_are_saved() {
    let here = here();
    let server = ChatServer::start(ChatOptions::default(), delegating);
    let url = server.openai_url();
    let models = format!(
        "default = \"big\"\nsub = \"small\"\n\
         [models.big]\nprovider = \"openai\"\nbase_url = \"{url}\"\ninput_price = 1000.0\n\
         output_price = 2000.0\n[models.small]\nprovider = \"openai\"\nbase_url = \"{url}\"\n"
    );
    fs::write(here.path().join("models.toml"), models).unwrap();
    let args = [
        "what?",
        "--context",
        "c.txt",
        "--models",
        "models.toml",
        "--max-depth",
        "2",
        "--share-context",
        "--var",
        "limit=7",
        "--json",
        "--snapshot-out",
        "after.kaa",
    ];
    let output = command(here.path(), &args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let done = object(&output);
    assert_eq!(done["answer"], "small read one two three of 7");
    assert_eq!(done["root_model"], "big");
    let models = &done["usage_summary"]["model_usage_summaries"];
    assert_eq!(
        (&models["big"]["total_calls"], &models["small"]["total_calls"]),
        (&2.into(), &1.into())
    );
    assert!(done["usage_summary"]["total_cost"].as_f64().unwrap() > 0.0, "{done}");

    // The session goes on elsewhere.
    let mut next = Command::new(env!("CARGO_BIN_EXE_kaa"));
    next.current_dir(here.path()).args(["run", "--snapshot-in", "after.kaa", "-c"]);
    next.arg("print(context.strip(), answer['ready'], len(history))");
    let next = next.output().unwrap();
    assert_eq!(text(&next.stdout), "one two three True 4\n", "{}", text(&next.stderr));

    // A price that the budget can't pay.
    let args = [&args[..7], &["--max-budget", "0.001", "--json"]].concat();
    let output = command(here.path(), &args).output().unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
    assert_eq!(object(&output)["error"]["kind"], "budget");
}
