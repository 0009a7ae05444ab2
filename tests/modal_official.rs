//! Modal's official clients against the server that takes Modal's place in the tests, and Kaa's requests
//! beside theirs.
//!
//! The failure guarded against: Kaa and the stand-in agree with each other, but not with Modal. What its
//! own clients send and expect is as near to Modal as one gets without an account. They are installed by
//! pip and npm on the first run.

#[path = "common/modal.rs"]
mod cloud;
#[path = "modal_official/faults.rs"]
mod faults;
#[path = "modal_official/requests.rs"]
mod requests;
#[path = "common/required.rs"]
mod required;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;

use cloud::{StandIn, StandInOptions, packages};
use libtest_mimic::{Arguments, Failed};
use serde_json::{Value as Json, json};

const SUITE: &str = "modal_official";

/// The client for Python, with what it needs.
const PYTHON_PACKAGES: &[&str] = &[
    "modal==1.6.4",
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "anyio==4.16.0",
    "attrs==26.1.0",
    "cbor2==6.3.0",
    "certifi==2026.10.19.post1",
    "click==8.5.1",
    "frozenlist==1.8.0",
    "grpclib==0.4.9",
    "h2==4.4.1",
    "hpack==4.2.0",
    "hyperframe==6.1.0",
    "idna==3.20",
    "markdown-it-py==4.3.0",
    "mdurl==0.1.2",
    "multidict==7.2.1",
    "propcache==0.5.4",
    "protobuf==7.36.2",
    "Pygments==2.21.0",
    "rich==15.0.0",
    "synchronicity==0.12.7",
    "toml==0.10.2",
    "typing_extensions==4.16.0",
    "watchfiles==1.3.0",
    "yarl==1.25.1",
];
/// The client for JavaScript. The name without a version is another package.
const NODE_PACKAGE: &str = "modal@0.11.1";
const PYTHONS: &[&str] = &["python3", "python", "python3.14", "python3.13", "python3.12"];
const IS_NEW_ENOUGH: &str = "import sys; sys.exit(sys.version_info < (3, 10))";

/// One of Modal's clients, installed.
struct Client {
    program: &'static str,
    script: &'static str,
    packages: PathBuf,
}

impl Client {
    /// A script of this suite, which sees neither this user's account nor the settings of one.
    fn script(&self, name: &str) -> Command {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/modal_official");
        let mut command = Command::new(self.program);
        command.arg(scripts.join(name));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MODAL_") {
                command.env_remove(name);
            }
        }
        command
            .env("PYTHONPATH", &self.packages)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("MODAL_PACKAGES", &self.packages)
            .env("MODAL_CONFIG_PATH", "/nonexistent/modal.toml");
        command
    }

    /// Runs a case over a stand-in, and gives what it says in the end.
    fn run(&self, stand_in: &StandIn, secret: &str, case: &str, plan: &Json) -> Json {
        let mut command = self.script(self.script);
        command
            .args([case, &plan.to_string()])
            .env("MODAL_SERVER_URL", stand_in.url())
            .env("MODAL_TOKEN_ID", StandInOptions::default().token_id)
            .env("MODAL_TOKEN_SECRET", secret);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{} {case}: {out}{err}", self.script);
        let last = out.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{case}: {error}: {out}"))
    }
}

fn python() -> &'static Result<Client, String> {
    static PYTHON: OnceLock<Result<Client, String>> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let is_new_enough = |python: &&&str| {
            let mut command = Command::new(python);
            command.args(["-c", IS_NEW_ENOUGH]).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let program =
            PYTHONS.iter().find(is_new_enough).ok_or("there is no Python 3.10 or newer")?;
        let packages = packages::installed_as("modal-python-1.6.4", program, PYTHON_PACKAGES)?;
        Ok(Client { program, script: "client.py", packages })
    })
}

fn node() -> &'static Result<Client, String> {
    static NODE: OnceLock<Result<Client, String>> = OnceLock::new();
    NODE.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let packages = target.join(NODE_PACKAGE);
        if !packages.exists() {
            let io = |error: std::io::Error| error.to_string();
            let fresh = tempfile::tempdir_in(target).map_err(io)?;
            let made = fresh.path().join("packages");
            std::fs::create_dir(&made).map_err(io)?;
            let output = Command::new("npm")
                .args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
                .arg(&made)
                .arg(NODE_PACKAGE)
                .stdin(Stdio::null())
                .output()
                .map_err(|error| format!("`npm` can't be started: {error}"))?;
            if !output.status.success() {
                let words = String::from_utf8_lossy(&output.stderr);
                return Err(format!("`npm install` says: {}", words.trim()));
            }
            match std::fs::rename(made, &packages) {
                // When it's there all the same, another run was quicker.
                Err(error) if !packages.exists() => return Err(error.to_string()),
                _ => {}
            }
        }
        Ok(Client { program: "node", script: "client.mjs", packages })
    })
}

type Need = fn() -> &'static Result<Client, String>;
const CLIENTS: [(&str, Need); 2] = [("python", python), ("node", node)];

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (name, need) in CLIENTS {
        let mut add = |test_name: String, test: Box<dyn FnOnce(&Client) + Send>| {
            trials.push(required::trial(SUITE, format!("{name}_{test_name}"), need, |client| {
                test(client);
                Ok::<(), Failed>(())
            }));
        };
        add("uses_a_sandbox_in_every_way".into(), Box::new(whole));
        for case in ["ends", "refused"] {
            add(format!("{case}_as_modal_does"), Box::new(move |client| plain(client, case)));
        }
        add("is_refused_with_a_wrong_token".into(), Box::new(stranger));
        for fault in faults::all().into_iter().filter(|fault| fault.is_for(name)) {
            add(fault.name(), Box::new(move |client| fault.check(client)));
        }
    }
    trials.push(required::trial(SUITE, "kaa_sends_what_python_sends", python, |client| {
        requests::compare(client);
        Ok(())
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn start(options: StandInOptions) -> StandIn {
    let known = BTreeMap::from([("KNOWN".to_owned(), "k".to_owned())]);
    let secrets = BTreeMap::from([("known".to_owned(), known)]);
    StandIn::start_blocking(StandInOptions { secrets, ..options })
}

/// Runs a case whose token is right.
fn run(client: &Client, stand_in: &StandIn, case: &str, plan: &Json) -> Json {
    client.run(stand_in, &StandInOptions::default().token_secret, case, plan)
}

/// Nothing of these sandboxes runs any more.
fn assert_all_ended(stand_in: &StandIn) {
    for sandbox in stand_in.sandboxes() {
        assert!(!sandbox.is_running && sandbox.pids.is_empty(), "{sandbox:?}");
    }
}

fn whole(client: &Client) {
    let stand_in = start(StandInOptions::default());
    // Ports that nobody has now; both listen until both are known, so that they differ.
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [port, other_port] = listeners.map(|listener| listener.local_addr().unwrap().port());
    let certificate = stand_in.root_certificate();
    let plan = json!({ "port": port, "other_port": other_port, "certificate": certificate });
    let result = run(client, &stand_in, "whole", &plan);
    assert_all_ended(&stand_in);
    let sandboxes = stand_in.sandboxes();
    assert_eq!(sandboxes.len(), 2);
    let sandbox = sandboxes.iter().find(|sandbox| result["id"] == *sandbox.id).unwrap();
    let resources = sandbox.definition.resources.unwrap();
    assert_eq!((resources.milli_cpu, resources.milli_cpu_max), (500, 2000));
    assert_eq!((resources.memory_mb, resources.memory_mb_max), (128, 4096));
    assert_eq!(sandbox.definition.timeout_secs, 120);
    assert_eq!(sandbox.definition.workdir.as_deref(), Some("/work"));
    // The base, the packages, the variables.
    assert_eq!(stand_in.calls("ImageGetOrCreate"), 3);
}

fn plain(client: &Client, case: &str) {
    let stand_in = start(StandInOptions::default());
    run(client, &stand_in, case, &json!({}));
}

fn stranger(client: &Client) {
    let stand_in = start(StandInOptions::default());
    client.run(&stand_in, "as-wrong", "stranger", &json!({}));
    assert_eq!(stand_in.sandboxes().len(), 0);
}
