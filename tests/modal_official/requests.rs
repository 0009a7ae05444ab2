//! Kaa's requests beside those of Modal's client for Python, for the same work, field by field.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use kaa::modal::{ModalClient, ModalImage, Network, ProcessExit, SandboxSpec, Secret};
use regex::Regex;
use serde_json::{Map, Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::cloud::{StandIn, StandInOptions};
use crate::{Client, run, start};

/// Where Kaa and the client differ and may: the RPC, the path of the field, and why.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    (
        "ImageGetOrCreate",
        "namespace",
        "the default of the server, which Modal's client for JavaScript doesn't send either",
    ),
    (
        "ImageJoinStreaming",
        "include_logs_for_finished",
        "the log of a build that ends before it's asked for is wanted all the same",
    ),
    ("SandboxCreateV2", "tags.1.tag_name", "what Kaa makes tells whose it is"),
    ("SandboxCreateV2", "tags.1.tag_value", "what Kaa makes tells whose it is"),
    ("SandboxCreateV2", "tags.2.tag_name", "what Kaa makes tells whose it is"),
    ("SandboxCreateV2", "tags.2.tag_value", "what Kaa makes tells whose it is"),
    (
        "SandboxWaitV2",
        "*",
        "Kaa finds a sandbox by its task, whose answer says whether it has ended; Python waits for 0 s too",
    ),
];

/// A message by path: what is at its leaves.
type Fields = BTreeMap<String, Json>;

/// Of each RPC the different messages, in order.
type Requests = BTreeMap<String, Vec<Fields>>;

pub(crate) fn compare(client: &Client) {
    let theirs = start(StandInOptions { record: true, ..StandInOptions::default() });
    run(client, &theirs, "requests", &json!({}));
    let theirs = decoded(client, &theirs);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut ours = Requests::new();
    for stdin_streams in [false, true] {
        let options = StandInOptions { record: true, stdin_streams, ..StandInOptions::default() };
        let stand_in = start(options);
        runtime.block_on(the_same_by_kaa(&stand_in));
        merge(&mut ours, decoded(client, &stand_in));
    }

    let mut found = BTreeSet::new();
    for rpc in ours.keys().chain(theirs.keys()) {
        let of = |requests: &Requests| requests.get(rpc).cloned().unwrap_or_default();
        let (ours, mut theirs) = (of(&ours), of(&theirs));
        // What both send needs no look; the rest is compared in order.
        let (both, rest): (Vec<_>, Vec<_>) = ours.into_iter().partition(|our| theirs.contains(our));
        theirs.retain(|their| !both.contains(their));
        let ours = rest;
        if ours.len() != theirs.len() {
            let rest = format!("ours {ours:?}, theirs {theirs:?}");
            found.insert((rpc.clone(), "*".to_owned(), rest));
            continue;
        }
        for (ours, theirs) in ours.iter().zip(&theirs) {
            for path in ours.keys().chain(theirs.keys()) {
                let (our, their) = (ours.get(path), theirs.get(path));
                if our != their {
                    let values = format!("ours {our:?}, theirs {their:?}");
                    found.insert((rpc.clone(), path.clone(), values));
                }
            }
        }
    }
    let is = |(rpc, path, _): &(String, String, String), other: &(&str, &str, &str)| {
        rpc == other.0 && path == other.1
    };
    let unexpected: Vec<_> =
        found.iter().filter(|one| !DIFFERENCES.iter().any(|other| is(one, other))).collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
    for known in DIFFERENCES {
        assert!(found.iter().any(|one| is(one, known)), "{known:?} is no difference any more");
    }
}

/// What `requests` in `client.py` does.
async fn the_same_by_kaa(stand_in: &StandIn) {
    let client = ModalClient::connect(stand_in.config()).await.unwrap();
    let given = Secret::Variable { name: "GIVEN".into(), value: "g".into() };
    let spec = SandboxSpec {
        app: "official".into(),
        image: ModalImage::default().pip_install(["dill"]),
        cpu: 1.0,
        memory_mib: 1024,
        timeout: Duration::from_secs(600),
        network: Network::Blocked,
        secrets: vec![given],
        tags: vec![("kind".into(), "requests".into())],
        workdir: Some("/work".into()),
        ..SandboxSpec::default()
    };
    let sandbox = client.create_sandbox(&spec, &|_| {}).await.unwrap();
    let own = [("OWN".to_owned(), "o".to_owned())];
    let mut process = sandbox.exec(&["sh", "-c", "cat; exit 7"], &own).await.unwrap();
    let mut stdin = process.stdin().unwrap();
    stdin.write_all(b"hello").await.unwrap();
    drop(stdin);
    let mut text = String::new();
    process.stdout().unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello");
    assert_eq!(process.wait().await.unwrap(), ProcessExit::Code(7));
    sandbox.snapshot_filesystem(None).await.unwrap();
    let same = client.sandbox(sandbox.id()).await.unwrap();
    let process = same.exec(&["true"], &[]).await.unwrap();
    assert_eq!(process.wait().await.unwrap(), ProcessExit::Code(0));
    let found = client.sandboxes(Some("official")).await.unwrap();
    assert_eq!(found.len(), 1, "it has Kaa's tags");
    sandbox.terminate().await.unwrap();
    sandbox.wait().await.unwrap();
}

/// What was asked of a stand-in, without what differs between any two runs.
fn decoded(client: &Client, stand_in: &StandIn) -> Requests {
    let mut raw = Vec::new();
    for call in stand_in.log() {
        for message in call.messages {
            let hex: String = message.iter().map(|byte| format!("{byte:02x}")).collect();
            raw.push((call.rpc.clone(), hex));
        }
    }
    let mut child =
        client.script("decode.py").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(json!(raw).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let messages: Vec<(String, Json)> = serde_json::from_slice(&output.stdout).unwrap();
    let mut requests = Requests::new();
    for (rpc, message) in messages {
        let mut fields = Fields::new();
        flatten("", &message, &mut fields);
        merge(&mut requests, Requests::from([(rpc, vec![fields])]));
    }
    requests
}

/// Adds what isn't there yet: a question that is asked again and again is one.
fn merge(requests: &mut Requests, more: Requests) {
    for (rpc, messages) in more {
        let known = requests.entry(rpc).or_default();
        for message in messages {
            if !known.contains(&message) {
                known.push(message);
            }
        }
    }
}

/// Puts what is at the leaves into `fields`; a message without fields is as good as none.
fn flatten(path: &str, value: &Json, fields: &mut Fields) {
    let at = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Json::Object(map) => {
            let map: &Map<String, Json> = map;
            map.iter().for_each(|(key, value)| flatten(&at(key), value, fields));
        }
        Json::Array(list) => {
            let indexed = list.iter().enumerate();
            indexed.for_each(|(index, value)| flatten(&at(&index.to_string()), value, fields));
        }
        Json::String(text) => drop(fields.insert(path.to_owned(), json!(without_ids(text)))),
        Json::Number(_) if path.ends_with("timestamp") => {
            drop(fields.insert(path.to_owned(), json!("<time>")))
        }
        other => drop(fields.insert(path.to_owned(), other.clone())),
    }
}

fn without_ids(text: &str) -> String {
    let id = Regex::new(r"^(ap|im|sb|ta|st)-[0-9a-f]{24}V?$").unwrap();
    let uuid = Regex::new(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$").unwrap();
    let session = Regex::new(r"^[0-9a-f]{16}$").unwrap();
    match id.captures(text) {
        Some(found) => format!("<{}>", &found[1]),
        None if session.is_match(text) => "<session>".into(),
        None if uuid.is_match(text) => "<uuid>".into(),
        None => text.to_owned(),
    }
}
