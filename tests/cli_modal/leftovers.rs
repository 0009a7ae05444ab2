//! `kaa modal`: which sandboxes it names, and which it ends.

use std::collections::BTreeSet;
use std::time::Duration;

use kaa::modal::{ModalBackend, ModalClient, ModalOptions, SandboxSpec};
use kaa::{Backend, Environment, EnvironmentOptions};
use serde_json::Value as Json;
use tokio::runtime::Runtime;
use tonic::Code;

use crate::Cloud;
use crate::cloud::proto::client as wire;
use crate::cloud::{Fault, StandInOptions};
use crate::program::{Case, fails, ok, text};
use crate::run::{LONG, in_mid_cell, send, sent};

/// Sandboxes of all kinds, in two apps.
struct Scene {
    cloud: Cloud,
    /// Of a program that was killed, in the app `kaa`.
    dead: String,
    /// Of this process, in the app `other`.
    alive: String,
    /// Of another machine, in the app `kaa`.
    elsewhere: String,
    /// Not Kaa's, in both apps.
    foreign: [String; 2],
    _session: Box<dyn Environment>,
    _runtime: Runtime,
}

impl Scene {
    fn new() -> Self {
        let cloud = Cloud::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let mut child = cloud.place.spawn("run", &[LONG]);
        in_mid_cell(&cloud);
        let dead = cloud.begun().id;
        send(&child, "KILL");
        child.wait().unwrap();
        let config = cloud.stand_in.config();
        let options = ModalOptions { app: "other".into(), ..ModalOptions::default() };
        let (session, elsewhere, foreign) = runtime.block_on(async {
            let backend = ModalBackend::connect(config.clone(), options, &|_| {}).await.unwrap();
            let session = backend.open(EnvironmentOptions::default()).await.unwrap();
            let client = ModalClient::connect(config).await.unwrap();
            let make = async |app: &str, tags: &[(&str, &str)]| {
                let spec = SandboxSpec { app: app.into(), ..SandboxSpec::default() };
                let id = client.create_sandbox(&spec, &|_| {}).await.unwrap().id().to_owned();
                cloud.stand_in.retag(&id, tags);
                id
            };
            let owner = ("kaa-owner", "00112233445566ff-1-1");
            let elsewhere =
                make("kaa", &[("kaa-session", "5"), owner, ("team", "\u{1b}[2Jred")]).await;
            let foreign = [make("kaa", &[("team", "red")]).await, make("other", &[]).await];
            (session, elsewhere, foreign)
        });
        let known: BTreeSet<_> = [&dead, &elsewhere].into_iter().chain(&foreign).cloned().collect();
        let ids = cloud.running().into_iter().map(|sandbox| sandbox.id);
        let alive: Vec<_> = ids.filter(|id| !known.contains(id)).collect();
        assert_eq!(alive.len(), 1, "{alive:?}");
        let alive = alive[0].clone();
        Self { cloud, dead, alive, elsewhere, foreign, _session: session, _runtime: runtime }
    }

    fn running(&self) -> BTreeSet<String> {
        self.cloud.running().into_iter().map(|sandbox| sandbox.id).collect()
    }

    fn list(&self, words: &str) -> Vec<Json> {
        let output = self.cloud.place.run(&format!("modal list --json {words}"), &[], "");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn set<'a>(ids: impl IntoIterator<Item = &'a String>) -> BTreeSet<String> {
    ids.into_iter().cloned().collect()
}

#[test]
fn the_sandboxes_of_sessions_are_listed() {
    let scene = Scene::new();
    for (words, expected) in [
        (
            "",
            vec![(&scene.dead, Some(false)), (&scene.alive, Some(true)), (&scene.elsewhere, None)],
        ),
        ("--app kaa", vec![(&scene.dead, Some(false)), (&scene.elsewhere, None)]),
        ("--app other", vec![(&scene.alive, Some(true))]),
        ("--app not-there", vec![]),
    ] {
        let records = scene.list(words);
        let found = records.iter().map(|record| {
            assert!(record["created_at"].as_f64().unwrap() > 1.6e9, "{record}");
            assert!(record["tags"]["kaa-session"].is_string(), "{record}");
            (record["id"].as_str().unwrap().to_owned(), record["has_owner"].as_bool())
        });
        let found: BTreeSet<_> = found.collect();
        let expected: BTreeSet<_> = expected.into_iter().map(|(id, is)| (id.clone(), is)).collect();
        assert_eq!(found, expected, "{words}");
    }
    let output = scene.cloud.place.run("modal list", &[], "");
    let stdout = text(&output.stdout);
    assert_eq!((output.status.code(), stdout.lines().count()), (Some(0), 3), "{stdout}");
    for (id, owner) in
        [(&scene.dead, "dead"), (&scene.alive, "alive"), (&scene.elsewhere, "unknown")]
    {
        let row = stdout.lines().find(|line| line.starts_with(id.as_str())).unwrap();
        assert!(row.contains("0 min  owner ") && row.contains(&format!("owner {owner} ")), "{row}");
        assert!(row.contains("kaa-session="), "{row}");
    }
    assert!(stdout.contains(r"team=\u{1b}[2Jred") && !stdout.contains('\u{1b}'), "{stdout}");
    assert_eq!(scene.running().len(), 5, "a list ends nothing");
}

#[test]
fn nothing_is_said_to_be_nothing() {
    let cloud = Cloud::new();
    let nothing: &[&str] = &["kaa: Kaa has no sandbox there"];
    cloud.place.check(&[
        fails("modal list", &[], 0, nothing),
        fails("modal list --app not-there", &[], 0, nothing),
        fails("modal clean", &[], 0, &["kaa: there is nothing to end"]),
        fails("modal clean --all --app not-there", &[], 0, &["kaa: there is nothing to end"]),
    ]);
    let output = cloud.place.run("modal list --json", &[], "");
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty());
    assert!(cloud.stand_in.sandboxes().is_empty());
}

#[test]
fn only_what_dead_processes_left_is_ended() {
    let scene = Scene::new();
    let all = scene.running();
    let left = "kaa: 2 left, of processes that live or of other machines; `kaa modal list` names";
    scene.cloud.place.check(&[fails("modal clean --app other", &[], 0, &["kaa: 1 left, "])]);
    assert_eq!(scene.running(), all);
    let ended = format!("{} ended\n", scene.dead);
    let case = ok("modal clean", &[], &ended);
    scene.cloud.place.check(&[Case { stderr: &[left], ..case }]);
    let rest: BTreeSet<_> = all.iter().filter(|id| **id != scene.dead).cloned().collect();
    assert_eq!(scene.running(), rest);
    scene.cloud.place.check(&[fails("modal clean", &[], 0, &[left])]);
    assert_eq!(scene.running(), rest);
    // Whoever wants all of Kaa's has them, of one app or of all; others' stay.
    let ended = format!("{} ended\n", scene.elsewhere);
    scene.cloud.place.check(&[ok("modal clean --all --app kaa", &[], &ended)]);
    let ended = format!("{} ended\n", scene.alive);
    scene.cloud.place.check(&[ok("modal clean --all", &[], &ended)]);
    assert_eq!(scene.running(), set(&scene.foreign));
}

#[test]
fn what_can_not_be_ended_is_a_failure() {
    let scene = Scene::new();
    scene.cloud.stand_in.fault("SandboxTerminateV2", Fault::Before(Code::PermissionDenied));
    let output = scene.cloud.place.run("modal clean --all", &[], "");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(125), "{stdout}{stderr}");
    // The one that came first isn't ended; the others are tried all the same.
    assert_eq!(stdout.matches(" not ended\n").count(), 1, "{stdout}");
    assert_eq!(stdout.matches(" ended\n").count(), 3, "{stdout}");
    assert!(stderr.contains("ending the Modal sandbox"), "{stderr}");
    assert_eq!(scene.running().len(), 1 + scene.foreign.len());
}

#[test]
fn a_new_session_ends_what_a_dead_process_left_in_its_app() {
    let scene = Scene::new();
    scene.cloud.place.check(&[ok("run", &["print(1)"], "1\n")]);
    let mut expected = set(&scene.foreign);
    expected.extend([scene.alive.clone(), scene.elsewhere.clone()]);
    assert_eq!(scene.running(), expected);
    assert_eq!(scene.list("").len(), 2);
}

#[test]
fn the_environment_is_the_one_of_the_flag_or_of_the_variable() {
    let mut cloud = Cloud::with(StandInOptions { record: true, ..StandInOptions::default() });
    let asked = |cloud: &Cloud| {
        let lists: Vec<wire::SandboxListRequest> = sent(cloud, "SandboxListV2");
        lists.last().unwrap().environment_name.clone()
    };
    for (variable, words, expected) in [
        ("", "modal list", ""),
        ("", "modal list --environment staging", "staging"),
        ("", "modal clean --environment staging", "staging"),
        ("main", "modal list", "main"),
        ("main", "modal clean --environment staging", "staging"),
    ] {
        cloud.place.set("MODAL_ENVIRONMENT", variable);
        cloud.place.check(&[fails(words, &[], 0, &[])]);
        assert_eq!(asked(&cloud), expected, "{variable:?} {words}");
    }
}

#[test]
fn long_lists_are_read_to_their_end() {
    let cloud = Cloud::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let config = cloud.stand_in.config();
    runtime.block_on(async {
        let client = ModalClient::connect(config).await.unwrap();
        for _ in 0..45 {
            // Nothing has to run in it.
            let entrypoint = vec!["sleep".to_owned(), "600".to_owned()];
            let timeout = Duration::from_secs(600);
            let spec = SandboxSpec { entrypoint, timeout, ..SandboxSpec::default() };
            client.create_sandbox(&spec, &|_| {}).await.unwrap();
        }
    });
    let output = cloud.place.run("modal list --json", &[], "");
    assert_eq!(text(&output.stdout).lines().count(), 45);
    let output = cloud.place.run("modal clean --all", &[], "");
    assert_eq!(text(&output.stdout).matches(" ended\n").count(), 45);
    assert_eq!(cloud.all_ended("modal clean --all"), 45);
}
