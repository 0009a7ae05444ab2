//! The flags that choose models, against a server on the loopback.
//!
//! The tests need the image `base` in a store: that of `KAA_TEST_CACHE` if it is set, otherwise the
//! user's.

#[path = "common/chat_server.rs"]
mod chat_server;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use chat_server::{ChatOptions, ChatServer};
use tempfile::TempDir;

/// The variables that would change what a test finds.
const VARIABLES: [&str; 7] = [
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
];

fn kaa(here: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kaa"));
    command.current_dir(here);
    if let Some(cache) = std::env::var_os("KAA_TEST_CACHE") {
        command.env("KAA_CACHE", cache);
    }
    for name in VARIABLES {
        command.env_remove(name);
    }
    command
}

/// `kaa run` of one cell, with an image to run from.
fn run(here: &Path, words: &str, variables: &[(&str, &str)], cell: &str) -> Output {
    static READY: OnceLock<()> = OnceLock::new();
    READY.get_or_init(|| {
        let mut build = kaa(&std::env::temp_dir());
        let status = build.args(["image", "build", "base"]).stdout(Stdio::null()).status();
        assert!(status.unwrap().success(), "`kaa image build base` failed");
    });
    let mut command = kaa(here);
    command.arg("run").args(words.split_whitespace()).args(["-c", cell]);
    command.envs(variables.iter().copied()).output().unwrap()
}

/// What a run that succeeds prints.
fn printed(here: &Path, words: &str, variables: &[(&str, &str)], cell: &str) -> String {
    let output = run(here, words, variables, cell);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{words}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A server that says who was asked, by which key, and what.
fn server() -> ChatServer {
    ChatServer::start(ChatOptions::default(), |request| {
        let header = |name: &str| request.headers.get(name).and_then(|value| value.to_str().ok());
        let key = header("authorization").or(header("x-api-key")).unwrap_or("no key");
        format!("{}, {key}: {}", request.body["model"].as_str().unwrap(), request.prompt())
    })
}

#[test]
fn flags_choose_the_model() {
    let here = TempDir::new().unwrap();
    let server = server();
    fs::write(here.path().join("key"), " from-file \r\n").unwrap();
    fs::write(here.path().join("rules.json"), r#"{"default": {"response": "by rule"}}"#).unwrap();
    let (openai, anthropic) = (server.openai_url(), server.anthropic_url());
    let model = format!("--model openai:x --base-url {openai}");
    let both = "print(llm_query('hi'))\nprint(llm_query_batched(['a', 'b'], model='x'))";
    for (words, variables, cell, expected) in [
        (model.clone(), &[][..], "print(llm_query('hi'))", "x, no key: hi\n"),
        // A key is for its provider alone.
        (model.clone(), &[("OPENAI_API_KEY", "k")], "print(llm_query('hi'))", "x, no key: hi\n"),
        (
            format!("{model} --key-env MINE"),
            &[("MINE", "k")],
            "print(llm_query('hi', model='y'))",
            "x, Bearer k: hi\n",
        ),
        (
            format!("--model anthropic:x --base-url {anthropic} --key-file key"),
            &[],
            "print(llm_query([{'role': 'user', 'content': 'hi'}]))",
            "x, from-file: hi\n",
        ),
        (
            format!("{model} --sub-model openai:y"),
            &[],
            both,
            "y, no key: hi\n['x, no key: a', 'x, no key: b']\n",
        ),
        (
            format!("{model} --sub-model script:rules.json"),
            &[],
            both,
            "by rule\n['x, no key: a', 'x, no key: b']\n",
        ),
        ("--model script:rules.json".into(), &[], "print(llm_query('hi'))", "by rule\n"),
    ] {
        assert_eq!(printed(here.path(), &words, variables, cell), expected, "{words}");
    }
}

#[test]
fn a_file_describes_models() {
    let here = TempDir::new().unwrap();
    let server = server();
    let file = format!(
        r#"
        default = "big"
        sub = "small"
        [models.big]
        provider = "openai"
        model = "provider-s-name"
        base_url = "{}"
        key_env = "BIG_KEY"
        [models.small]
        provider = "anthropic"
        base_url = "{}"
        "#,
        server.openai_url(),
        server.anthropic_url()
    );
    fs::write(here.path().join("models.toml"), file).unwrap();
    let cell = "for model in (None, 'big', 'small', 'x'): print(llm_query('hi', model=model))";
    let (big, small) = ("provider-s-name, Bearer k: hi\n", "small, no key: hi\n");
    for (words, expected) in [
        ("--models models.toml", [small, big, small, small]),
        ("--models models.toml --sub-model big", [big, big, small, big]),
        ("--models models.toml --model small --sub-model big", [big, big, small, big]),
    ] {
        let found = printed(here.path(), words, &[("BIG_KEY", "k")], cell);
        assert_eq!(found, expected.concat(), "{words}");
    }
    // The only model of a file stays the one that answers.
    let only =
        format!("[models.zed]\nprovider = \"openai\"\nbase_url = \"{}\"", server.openai_url());
    fs::write(here.path().join("only.toml"), only).unwrap();
    fs::write(here.path().join("rules.json"), r#"{"default": {"response": "by rule"}}"#).unwrap();
    let words = "--models only.toml --sub-model script:rules.json";
    let cell =
        "print(llm_query('hi'))\nprint(llm_query('hi', model='zed'))\nprint(rlm_query('hi'))";
    let expected = "by rule\nzed, no key: hi\nby rule\n";
    assert_eq!(printed(here.path(), words, &[], cell), expected);

    let output = run(here.path(), "--models models.toml", &[], "1");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("model \"big\": BIG_KEY is not set; set it to the key"), "{stderr}");
}

#[test]
fn mistakes_say_what_to_do() {
    let here = TempDir::new().unwrap();
    let write = |name: &str, text: &str| fs::write(here.path().join(name), text).unwrap();
    write("bad.toml", "[models.a]\nprovider = \"openai\"\nmodle = \"m\"");
    write("a.toml", "[models.a]\nprovider = \"openai\"");
    write("two.toml", "[models.b]\nprovider = \"openai\"\n[models.c]\nprovider = \"openai\"");
    write("empty", "\n");
    write("long", &"k".repeat(70_000));
    let local = "--model openai:x --base-url http://127.0.0.1:1/v1";
    for (words, expected) in [
        (
            "--model openai:x",
            "model \"x\": OPENAI_API_KEY is not set; set it to the key, or name another variable",
        ),
        ("--model anthropic:x", "model \"x\": ANTHROPIC_API_KEY is not set;"),
        ("--model openai:x --key-env MINE", "model \"x\": MINE is not set;"),
        ("--model x", "--model: \"x\": write openai:NAME, anthropic:NAME, script:FILE or socket:"),
        ("--model socket:x", "model \"socket:x\": LM handler address \"x\": write HOST:PORT"),
        ("--models a.toml --model b", "HOST:PORT, or a name in a.toml: a"),
        ("--models a.toml", "model \"a\": OPENAI_API_KEY is not set;"),
        ("--models missing", "--models: reading missing: No such file"),
        ("--models bad.toml", "--models: bad.toml: models.a: unknown field `modle`"),
        ("--model script:missing", "reading missing: No such file"),
        ("--sub-model openai:x", "--sub-model: give --model or --models too"),
        ("--base-url http://h/v1", "--base-url: it is for --model openai:NAME or anthropic:NAME"),
        ("--key-env A --model script:x", "--key-env: it is for --model openai:NAME or anthropic:"),
        ("--model openai:x --base-url h", "model \"x\": base_url: it is no URL; write it as https"),
        ("--model openai:x --key-file missing", "reading missing: No such file"),
        ("--model openai:x --key-file empty", "model \"x\": empty is empty; write the key into it"),
        ("--model openai:x --key-file long", "long is too long for a key"),
        ("--key-env A --key-file B --model openai:x", "cannot be used with"),
        ("--lm 127.0.0.1:1 --model openai:x", "cannot be used with"),
        ("--lm-script rules --models a.toml", "cannot be used with"),
        ("--lm 127.0.0.1:1 --base-url http://h", "cannot be used with"),
        ("--lm-script rules --base-url http://h", "cannot be used with"),
        ("--lm-script rules --key-env K", "cannot be used with"),
        ("--lm-script rules --key-file k", "cannot be used with"),
        (
            "--models two.toml",
            "--models: two.toml: there are several models; set `default`, or give",
        ),
        ("--models two.toml --model b", "model \"b\": OPENAI_API_KEY is not set;"),
        (&format!("{local} --sub-model anthropic:y"), "model \"y\": ANTHROPIC_API_KEY is"),
        (
            "--model anthropic:x --base-url http://127.0.0.1:1 --sub-model openai:y",
            "model \"y\": OPENAI_API_KEY is not set;",
        ),
        (
            &format!("{local} --sub-model anthropic:x"),
            "--sub-model: another model is called \"x\" already; see --models",
        ),
    ] {
        let output = run(here.path(), words, &[], "1");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words}: {stderr}");
        assert!(stderr.contains(expected), "{words}: {stderr}");
        assert!(output.stdout.is_empty(), "{words}");
    }
    // A server that isn't there is an error of the call, which the cell sees as text.
    let one_try =
        "[models.a]\nprovider = \"openai\"\nbase_url = \"http://127.0.0.1:1/v1\"\nretries = 0";
    write("gone.toml", one_try);
    assert_eq!(
        printed(here.path(), "--models gone.toml", &[], "print(llm_query('hi'))"),
        "Error: a: no connection to 127.0.0.1:1: connection refused; does the server run?\n"
    );
}

#[test]
fn the_proxy_of_the_environment_is_used_for_other_machines() {
    let here = TempDir::new().unwrap();
    let (server, proxy) = (server(), ChatServer::echo());
    let socks = [("http_proxy", "socks5://127.0.0.1:1")];
    let output = run(here.path(), "--model openai:x --base-url http://far.invalid/v1", &socks, "1");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("model \"x\": http_proxy: only http:// and https://"), "{stderr}");
    let local = format!("--model openai:x --base-url {}", server.openai_url());
    let found = printed(here.path(), &local, &socks, "print(llm_query('hi'))");
    assert_eq!(found, "x, no key: hi\n");
    let proxy_url = format!("http://{}", proxy.address());
    for (base_url, no_proxy, expected) in [
        ("http://far.invalid/v1", "", "hi\n"),
        (&server.openai_url(), "", "x, no key: hi\n"),
        (&server.openai_url(), "other.invalid", "x, no key: hi\n"),
    ] {
        let words = format!("--model openai:x --base-url {base_url}");
        let variables = [("http_proxy", proxy_url.as_str()), ("NO_PROXY", no_proxy)];
        let found = printed(here.path(), &words, &variables, "print(llm_query('hi'))");
        assert_eq!(found, expected, "{base_url}");
    }
}
