//! Cells and questions in sandboxes: their output, the flags, and what is left.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use prost::Message;
use serde_json::Value as Json;

use crate::cloud::proto::client as wire;
use crate::cloud::proto::client::network_access::NetworkAccessType;
use crate::cloud::proto::client::sandbox::OpenPortsOneof;
use crate::cloud::proto::client::secret_source::Source;
use crate::cloud::{Fault, GenericStatus, StandInOptions};
use crate::program::{ANSWERS, Case, fails, ok, text};
use crate::{Cloud, wait_for};

/// A cell that says by a file that it runs, and goes on for longer than any test.
pub(crate) const LONG: &str =
    "import os, time\nopen(os.environ['HOME'] + '/begun', 'w').close()\ntime.sleep(600)";
/// The same, and no soft stop ends it.
const STUBBORN: &str = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n\
                        open(os.environ['HOME'] + '/begun', 'w').close()\nwhile True: pass";

#[test]
fn cells_run_in_a_sandbox_that_is_gone_afterwards() {
    let cloud = Cloud::new();
    let place = &cloud.place;
    place.write("rules.json", ANSWERS);
    place.write("hay.txt", &("hay\n".repeat(1000) + "needle kaa-42\n"));
    place.write("echo.json", r#"{"rules": [], "default": {"response": "a model's words"}}"#);
    place.write("setup.py", "import math\nstart = math.factorial(5)\n");
    place.write("bad.py", "oops = 1 / 0\n");
    place.write(
        "ends.json",
        r#"{"rules": [], "default": {"response": "```repl\nimport os; os._exit(4)\n```"}}"#,
    );
    let question = "complete Where? --context hay.txt";
    let (answered, lost) =
        (format!("{question} --lm-script rules.json"), format!("{question} --lm-script ends.json"));
    let unsaved = format!("{answered} --snapshot-out w");
    let too_large = "complete Where? --context large.txt --memory 64M --lm-script rules.json";
    place.write("large.txt", &"x".repeat(60 << 20));
    for (number, case) in [
        ok("run", &["x = 41", "print(x + 1)"], "42\n"),
        ok("run --lm-script echo.json", &["print(llm_query('a prompt'))"], "a model's words\n"),
        ok("run --context hay.txt", &["print(len(context))"], "4014\n"),
        ok("run --setup-code setup.py", &["print(start)"], "120\n"),
        ok("run --env KAA_X=5", &["import os; print(os.environ['KAA_X'])"], "5\n"),
        Case { code: 7, ..ok("run", &["print('a'); import sys; sys.exit(7)"], "a\n") },
        fails("run", &["1 / 0"], 1, &["ZeroDivisionError: division by zero"]),
        fails("run --wall 200ms", &["import time; time.sleep(60)"], 124, &["--wall raises it"]),
        fails("run --memory 128M", &["x = bytes(1 << 30)"], 1, &["MemoryError"]),
        Case { code: 3, ..ok("run", &["print('a'); import os; os._exit(3)"], "a\n") },
        fails("run", &["import os; os._exit(3)", "1"], 125, &["the cell after it was not run"]),
        fails("run --setup-code bad.py", &["1"], 2, &["--setup-code: it failed: ", "ZeroDivision"]),
        fails("run --var n=5 --snapshot-out s", &["1"], 2, &["--snapshot-out", "--modal-pip dill"]),
        fails(
            "run --python no-such-python",
            &["1"],
            125,
            &["Python 3.9 or newer", "no-such-python"],
        ),
        fails("run --python true", &["1"], 125, &["the session's process in the sandbox ended"]),
        Case { stdin: "x = 5\nx + 1\n", ..ok("repl", &[], "6\n") },
        Case { stdin: "import os; os._exit(3)\n:reset\n1\n", ..ok("repl", &[], "1\n") },
        ok(&answered, &[], "found kaa-42\n"),
        fails(&lost, &[], 125, &["the session has lost its state: the interpreter exited with 4"]),
        fails(&unsaved, &[], 2, &["--snapshot-out", "--modal-pip dill"]),
        fails(
            "run --modal-user 0",
            &["import os; os.kill(os.getppid(), 9)"],
            125,
            &["killed by signal 9"],
        ),
        fails("run --context large.txt --memory 64M", &["1"], 2, &["--context: it does not fit"]),
        fails("repl --context large.txt --memory 64M", &[], 2, &["--context: it does not fit"]),
        fails(too_large, &[], 2, &["context: it does not fit", "raise --memory"]),
    ]
    .iter()
    .enumerate()
    {
        place.check(std::slice::from_ref(case));
        assert_eq!(cloud.all_ended(case.words), number + 1, "{}", case.words);
    }
}

#[test]
fn a_record_says_what_became_of_a_cell() {
    let cloud = Cloud::new();
    let output = cloud.place.run("run --json", &["print('a')\n5", "1 / 0"], "");
    let records: Vec<Json> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&records[0]["stdout"], &records[0]["value"]), (&"a\n".into(), &"5".into()));
    assert_eq!(records[1]["outcome"], "raised");
    assert_eq!(cloud.all_ended("run"), 1);
}

/// The messages of an RPC that arrived.
pub(crate) fn sent<M: Message + Default>(cloud: &Cloud, rpc: &str) -> Vec<M> {
    let calls = cloud.stand_in.log().into_iter().filter(|call| call.rpc == rpc);
    calls.map(|call| M::decode(call.messages[0].clone()).unwrap()).collect()
}

#[test]
fn flags_arrive() {
    let named = BTreeMap::from([("FROM_ACCOUNT".to_owned(), "account".to_owned())]);
    let secrets = BTreeMap::from([("named".to_owned(), named)]);
    let mut cloud =
        Cloud::with(StandInOptions { record: true, secrets, ..StandInOptions::default() });
    cloud.place.set("FROM_HERE", "here");
    let flags = "--modal-image python:3.12-slim --modal-apt git --modal-app my-app \
                 --modal-environment staging --modal-timeout 2h --modal-tag team=blue \
                 --modal-tag empty= --modal-network 10.0.0.0/8,example.org --modal-secret named \
                 --modal-secret env:FROM_HERE --cpus 0.5 --memory 256M";
    let cell = "import os; print(os.environ['FROM_ACCOUNT'], os.environ['FROM_HERE'])";
    cloud.place.check(&[ok(&format!("run {flags}"), &[cell], "account here\n")]);

    let layers: Vec<wire::ImageGetOrCreateRequest> = sent(&cloud, "ImageGetOrCreate");
    let commands = layers.iter().map(|layer| layer.image.clone().unwrap().dockerfile_commands);
    let expected: [&[&str]; 2] = [
        &["FROM python:3.12-slim"],
        &["FROM base", "RUN apt-get update", "RUN apt-get install -y git"],
    ];
    assert_eq!(commands.collect::<Vec<_>>(), expected);
    for app in sent::<wire::AppGetOrCreateRequest>(&cloud, "AppGetOrCreate") {
        assert_eq!((app.app_name.as_str(), app.environment_name.as_str()), ("my-app", "staging"));
    }
    let secrets: Vec<wire::SecretGetOrCreateRequest> = sent(&cloud, "SecretGetOrCreate");
    assert_eq!((secrets.len(), secrets[0].environment_name.as_str()), (1, "staging"));
    let requests: Vec<wire::SandboxCreateV2Request> = sent(&cloud, "SandboxCreateV2");
    let [request] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!(request.secret_sources.len(), 2);
    let is_variable = |source: &wire::SecretSource| matches!(&source.source, Some(Source::Env(map)) if map.contents["FROM_HERE"] == "here");
    assert!(request.secret_sources.iter().any(is_variable), "{request:?}");
    let tag = |name: &str| {
        let tag = request.tags.iter().find(|tag| tag.tag_name == name);
        tag.map(|tag| tag.tag_value.as_str())
    };
    assert_eq!((tag("team"), tag("empty")), (Some("blue"), Some("")));
    assert!(tag("kaa-session").is_some() && tag("kaa-owner").is_some(), "{request:?}");
    let definition = request.definition.clone().unwrap();
    assert_eq!(definition.timeout_secs, 7200);
    let resources = definition.resources.unwrap();
    assert_eq!((resources.milli_cpu_max, resources.memory_mb_max), (500, 256 + 128));
    let access = definition.network_access.unwrap();
    assert_eq!(access.network_access_type(), NetworkAccessType::Allowlist);
    assert_eq!(access.allowed_cidrs, ["10.0.0.0/8"]);
    assert_eq!(access.allowed_domains, ["example.org"]);
    assert_eq!(cloud.all_ended("run"), 1);
}

#[test]
fn what_is_not_said_is_the_default() {
    let cloud = Cloud::with(StandInOptions { record: true, ..StandInOptions::default() });
    for (flags, network, ports) in [
        ("", NetworkAccessType::Blocked, &[][..]),
        ("--modal-network open", NetworkAccessType::Open, &[]),
        ("--modal-carrier stdio", NetworkAccessType::Blocked, &[]),
        ("--modal-carrier broker", NetworkAccessType::Allowlist, &[8080]),
        ("--modal-carrier broker:8181", NetworkAccessType::Allowlist, &[8181]),
        ("--modal-carrier broker --modal-network open", NetworkAccessType::Open, &[8080]),
    ] {
        cloud.place.check(&[ok(&format!("run {flags}"), &["print(1)"], "1\n")]);
        let sandboxes = cloud.stand_in.sandboxes();
        let definition = sandboxes.last().unwrap().definition.clone();
        let access = definition.network_access.unwrap();
        assert_eq!(access.network_access_type(), network, "{flags:?}");
        let Some(OpenPortsOneof::OpenPorts(open)) = definition.open_ports_oneof else {
            panic!("{flags:?}: no ports")
        };
        let open: Vec<u32> = open.ports.iter().map(|port| port.port).collect();
        assert_eq!(open, ports, "{flags:?}");
        assert_eq!(definition.timeout_secs, 3600);
    }
    for app in sent::<wire::AppGetOrCreateRequest>(&cloud, "AppGetOrCreate") {
        assert_eq!((app.app_name.as_str(), app.environment_name.as_str()), ("kaa", ""));
    }
}

/// Waits until the cell runs that the program has begun.
pub(crate) fn in_mid_cell(cloud: &Cloud) {
    let tags = cloud.begun().tags;
    let (_, session) = tags.into_iter().find(|(name, _)| name == "kaa-session").unwrap();
    let mark = format!("/tmp/kaa-{session}/begun");
    wait_for("cell that runs", || Path::new(&mark).exists().then_some(()));
}

pub(crate) fn send(child: &Child, signal: &str) {
    let status = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

#[test]
fn a_signal_ends_the_sandbox_too() {
    let cloud = Cloud::new();
    let escaped = LONG.replace('\n', "\\n");
    let rule = format!("```repl\\n{escaped}\\n```");
    let script = format!(r#"{{"rules": [], "default": {{"response": "{rule}"}}}}"#);
    cloud.place.write("rules.json", &script);
    let question = "complete question --lm-script rules.json";
    for (number, (words, cells, signal, code)) in [
        ("run", &[LONG][..], "INT", 130),
        ("run", &[LONG], "TERM", 143),
        ("run", &[STUBBORN], "TERM", 143),
        (question, &[], "INT", 130),
        (question, &[], "TERM", 143),
    ]
    .into_iter()
    .enumerate()
    {
        let child = cloud.place.spawn(words, cells);
        in_mid_cell(&cloud);
        send(&child, signal);
        let output = cloud.place.ended(child);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words} {signal}: {stderr}");
        assert_eq!(cloud.all_ended(&format!("{words} {signal}")), number + 1);
    }
}

/// Becomes the program, with SIGHUP as it is elsewhere, or as `nohup` makes it.
const WITH_HANGUP: &str = "import os, signal, sys\n\
                           signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))\n\
                           os.execv(sys.argv[2], sys.argv[2:])";

#[test]
fn a_terminal_that_goes_ends_the_sandbox_unless_the_command_is_to_outlive_it() {
    let mut cloud = Cloud::new();
    let cell = LONG.replace("600", "2") + "\nprint('done')";
    for (number, (hangup, code, stdout)) in
        [("SIG_DFL", 143, ""), ("SIG_IGN", 0, "done\n")].into_iter().enumerate()
    {
        cloud.place.launcher = ["python3", "-c", WITH_HANGUP, hangup].map(str::to_owned).to_vec();
        let child = cloud.place.spawn("run", &[&cell]);
        in_mid_cell(&cloud);
        send(&child, "HUP");
        let output = cloud.place.ended(child);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{hangup}: {stderr}");
        assert_eq!(text(&output.stdout), stdout, "{hangup}: {stderr}");
        assert_eq!(cloud.all_ended(hangup), number + 1);
    }
}

#[test]
fn a_signal_ends_a_sandbox_that_is_being_made() {
    let cloud = Cloud::new();
    for (number, (words, signal, code)) in
        [("run", "INT", 130), ("run", "TERM", 143)].into_iter().enumerate()
    {
        let delay = Fault::Delay(Duration::from_secs(1));
        cloud.stand_in.fault("TaskExecStart", delay);
        let child = cloud.place.spawn(words, &["print(1)"]);
        wait_for("sandbox", || (!cloud.running().is_empty()).then_some(()));
        send(&child, signal);
        let output = cloud.place.ended(child);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{signal}: {stderr}");
        assert!(output.stdout.is_empty(), "{signal}: {stderr}");
        assert_eq!(cloud.all_ended(signal), number + 1);
    }
}

/// Who asks twice doesn't wait for whatever takes its time.
#[test]
fn a_second_signal_ends_the_command_at_once() {
    let cloud = Cloud::new();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        cloud.stand_in.fault("TaskExecStart", Fault::Delay(Duration::from_secs(60)));
        // What the first round leaves, the second ends.
        let before: Vec<String> = cloud.running().into_iter().map(|left| left.id).collect();
        let child = cloud.place.spawn("run", &["print(1)"]);
        let is_new = || cloud.running().iter().any(|found| !before.contains(&found.id));
        wait_for("sandbox", || is_new().then_some(()));
        let since = Instant::now();
        send(&child, "TERM");
        std::thread::sleep(Duration::from_millis(1500));
        send(&child, signal);
        let output = cloud.place.ended(child);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    }
}

#[test]
fn a_sandbox_that_is_ended_from_outside_is_explained() {
    for (status, part) in [
        (GenericStatus::Timeout, "reached its timeout (--modal-timeout"),
        (GenericStatus::Terminated, "somebody ended the sandbox"),
        (GenericStatus::KernelOomKill, "raise --memory"),
    ] {
        let cloud = Cloud::new();
        let child = cloud.place.spawn("run", &[LONG]);
        in_mid_cell(&cloud);
        cloud.stand_in.end_sandbox(&cloud.begun().id, status);
        let output = cloud.place.ended(child);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{stderr}");
        assert!(output.stdout.is_empty() && stderr.contains(part), "{status:?}: {stderr}");
    }
}
