//! `kaa lm serve` as a user meets it: what it prints, how it ends, what it refuses.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use kaa::lm::{LmHandler, LmKind, LmRequest, LmToken, Prompt, SocketHandler};
use rustix::process::{Pid, Signal, kill_process};

const TOKEN: &str = "a token for the tests";

fn request(prompt: &str) -> LmRequest {
    LmRequest { kind: LmKind::Llm, prompt: Prompt::Text(prompt.into()), model: None, depth: 1 }
}

/// `kaa lm serve` with these flags, over a script in a directory of its own.
fn program(directory: &Path, flags: &[&str]) -> Command {
    let script = r#"{"rules": [{"contains": "boom", "error": "kaput"}],
        "default": {"response": "heard ${prompt}"}}"#;
    std::fs::write(directory.join("script.json"), script).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kaa"));
    command.current_dir(directory).args(["lm", "serve"]).args(flags);
    command.env("KAA_TEST_TOKEN", TOKEN).env("KAA_TEST_SHORT", "short");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[tokio::test]
async fn the_program_serves_until_a_signal_and_says_what_it_cost() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("token"), format!("{TOKEN}\n")).unwrap();
    for (flags, signal, code) in [
        (&["--lm-script", "script.json"][..], Signal::TERM, 0),
        (&["--lm-script", "script.json", "--token-env", "KAA_TEST_TOKEN"], Signal::INT, 130),
        (
            &[
                "--lm-script",
                "script.json",
                "--token-file",
                "token",
                "--listen",
                "0.0.0.0:0",
                "--max-connections",
                "1",
                "--request-bytes",
                "1K",
                "--timeout",
                "5s",
            ],
            Signal::TERM,
            0,
        ),
    ] {
        let mut child = program(here.path(), flags).spawn().unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on ").expect("the address");
        let port = address.rsplit_once(':').unwrap().1;
        let mut client = SocketHandler::new(format!("127.0.0.1:{port}")).unwrap();
        let no_token = client.complete(&request("a")).await;
        assert_eq!(no_token.is_ok(), flags.len() == 2, "{no_token:?}");
        client = client.with_token(LmToken::new(TOKEN).unwrap());
        let answers = client.complete_batch(&["\u{e9}", "boom"].map(request), 1).await;
        assert_eq!(answers[0].as_ref().unwrap().response, "heard \u{e9}");
        let failed = &answers[1].as_ref().unwrap_err().message;
        assert_eq!(failed, "llm() call failed - kaput");

        let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        let (mut rest, mut stderr) = (String::new(), String::new());
        stdout.read_to_string(&mut rest).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{stderr}");
        assert_eq!(rest, "");
        let calls = 1 + usize::from(no_token.is_ok());
        assert!(stderr.starts_with(&format!("kaa: answered: {calls} calls, ")), "{stderr}");
        assert!(stderr.contains("; 1 failed\nkaa: scripted: "), "{stderr}");
        assert!(!stderr.contains(TOKEN));
    }
}

#[tokio::test]
async fn models_are_chosen_by_depth_as_rlm_does() {
    let here = tempfile::tempdir().unwrap();
    for name in ["big", "small"] {
        let script = format!(r#"{{"default": {{"response": "from {name}"}}}}"#);
        std::fs::write(here.path().join(name), script).unwrap();
    }
    let flags = ["--model", "script:big", "--sub-model", "script:small"];
    let mut child = program(here.path(), &flags).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim_end().strip_prefix("listening on ").expect("the address");
    let client = SocketHandler::new(address).unwrap();
    for (depth, expected) in
        [(-1, "from big"), (0, "from big"), (1, "from small"), (2, "from big"), (7, "from big")]
    {
        let answer = client.complete(&LmRequest { depth, ..request("a") }).await.unwrap();
        assert_eq!(answer.response, expected, "{depth}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn the_calls_of_a_batch_that_was_late_are_in_the_sum() {
    let here = tempfile::tempdir().unwrap();
    let script = r#"{"rules": [{"contains": "slow", "response": "", "latency_ms": 3600000}],
        "default": {"response": "fast"}}"#;
    std::fs::write(here.path().join("slow"), script).unwrap();
    let flags = ["--lm-script", "slow", "--timeout", "1s"];
    let mut child = program(here.path(), &flags).spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    let address = line.trim_end().strip_prefix("listening on ").expect("the address");
    let client = SocketHandler::new(address).unwrap();
    let answers = client.complete_batch(&["slow", "a", "b"].map(request), 1).await;
    let answered: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(answered, [false, true, true]);
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{stderr}");
    assert!(stderr.starts_with("kaa: answered: 2 calls, "), "{stderr}");
}

#[test]
fn wrong_usage_is_named() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("short"), "short\n").unwrap();
    let script = ["--lm-script", "script.json"];
    for (flags, expected) in [
        (&[][..], "kaa: nobody would answer: say who, for example with --lm-script FILE"),
        (&["--listen", "0.0.0.0:0"], "--listen: other machines may reach 0.0.0.0:0; set a token"),
        (&["--listen", "nowhere"], "--listen: write HOST:PORT, for example 127.0.0.1:0"),
        (&["--max-connections", "0"], "--max-connections: it must be more than 0"),
        (&["--timeout", "0"], "it must be more than 0"),
        (&["--reply-bytes", "0"], "--reply-bytes: it must be more than 0"),
        (&["--token-env", "KAA_TEST_UNSET"], "--token-env KAA_TEST_UNSET: it is not set here"),
        (&["--token-env", "KAA_TEST_SHORT"], "--token-env KAA_TEST_SHORT: it has 5 bytes; take 16"),
        (&["--token-file", "missing"], "--token-file: missing: No such file"),
        (&["--token-file", "short"], "--token-file: short: it has 5 bytes; take 16"),
        (&["--token-file", "short", "--token-env", "X"], "cannot be used with"),
    ] {
        let lm = if flags.is_empty() { &[][..] } else { &script };
        let output = program(here.path(), &[flags, lm].concat()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
        assert!(stderr.contains(expected), "{flags:?}: {stderr}");
        assert!(output.stdout.is_empty());
    }
}
