//! What is left when sessions end, however they do: nothing.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use bollard::models::ContainerCreateBody;
use bollard::query_parameters::{ListContainersOptions, RemoveContainerOptions};
use kaa::docker::{DockerBackend, DockerHost, DockerOptions};
use kaa::{Backend, EnvironmentExt, EnvironmentOptions};

use crate::{Lab, block_on, open, print, until};

/// Makes this program a host of one session on the engine that it names.
pub(crate) const HOST_VARIABLE: &str = "KAA_TEST_DOCKER_HOST_PROCESS";
const OWNER_LABEL: &str = "kaa.owner";
const SOON: Duration = Duration::from_secs(10);

/// The owners of all containers of sessions, by their names.
async fn owners(lab: &Lab) -> HashMap<String, String> {
    let options = ListContainersOptions {
        all: true,
        filters: Some(HashMap::from([("label".to_owned(), vec![OWNER_LABEL.to_owned()])])),
        ..ListContainersOptions::default()
    };
    let listed = lab.api.list_containers(Some(options)).await.unwrap();
    let owner = |container: bollard::models::ContainerSummary| {
        let name = container.names.unwrap_or_default().pop()?;
        Some((name.trim_start_matches('/').to_owned(), container.labels?.remove(OWNER_LABEL)?))
    };
    listed.into_iter().filter_map(owner).collect()
}

/// Containers of the process with this number.
async fn count_of(lab: &Lab, pid: u32) -> usize {
    let part = format!("/{pid}/");
    owners(lab).await.values().filter(|owner| owner.contains(&part)).count()
}

/// Other tests of this process have sessions too, so that cycles are run in one of their own.
pub(crate) fn cycles(lab: &Lab) {
    let mut host = host_process(lab, "cycles");
    let pid = host.id();
    let status = host.wait().unwrap();
    assert!(status.success());
    block_on(async { assert_eq!(count_of(lab, pid).await, 0) });
}

/// Three ways to let go of a session, and of one that isn't there yet.
pub(crate) fn drops(lab: &Lab) {
    for way in ["drop", "panic", "halfway"] {
        let mut host = host_process(lab, way);
        let pid = host.id();
        let mut lines = BufReader::new(host.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "dropped", "{way}");
        block_on(until(way, SOON, || async { count_of(lab, pid).await == 0 }));
        // It still lives: not its end but the drop was what ended the container.
        assert!(host.try_wait().unwrap().is_none(), "{way}");
        drop(host.stdin.take());
        host.wait().unwrap();
    }
}

pub(crate) fn killed_host(lab: &Lab) {
    let mut host = host_process(lab, "wait");
    let pid = host.id();
    let mut lines = BufReader::new(host.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "open");
    block_on(async {
        assert_eq!(count_of(lab, pid).await, 1);
        host.kill().unwrap();
        host.wait().unwrap();
        until("the container ends with its host", SOON, || async { count_of(lab, pid).await == 0 })
            .await;
    });
}

pub(crate) fn leftovers(lab: &Lab) {
    block_on(async {
        let session = open(&lab.backend).await;
        let me = format!("/{}/", std::process::id());
        let found = owners(lab).await;
        let mine = found.values().find(|owner| owner.contains(&me)).expect("a session").clone();
        let (rest, _) = mine.rsplit_once('/').unwrap();
        let marked = [
            // As this process's number, but of one that was started before.
            ("dead", format!("{rest}/1")),
            ("alive", mine.clone()),
            ("foreign", format!("another-boot:1{me}1")),
            ("unknown", "unknown".to_owned()),
        ];
        for (name, owner) in &marked {
            let body = ContainerCreateBody {
                image: Some("python:3.11-slim".into()),
                labels: Some(HashMap::from([(OWNER_LABEL.to_owned(), owner.clone())])),
                ..ContainerCreateBody::default()
            };
            let name = format!("kaa-test-{name}-{}", std::process::id());
            let query = bollard::query_parameters::CreateContainerOptions {
                name: Some(name),
                ..Default::default()
            };
            lab.api.create_container(Some(query), body).await.unwrap();
        }
        DockerBackend::connect(lab.options(), &|_| {}).await.unwrap();
        let left = owners(lab).await;
        for (name, _) in &marked {
            let full = format!("kaa-test-{name}-{}", std::process::id());
            let is_there = left.contains_key(&full);
            if is_there {
                let query = RemoveContainerOptions { force: true, ..Default::default() };
                lab.api.remove_container(&full, Some(query)).await.unwrap();
            }
            assert_eq!(is_there, *name != "dead", "{name}");
        }
        session.close().await.unwrap();
    });
}

fn host_process(lab: &Lab, way: &str) -> std::process::Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(way).env(HOST_VARIABLE, &lab.host.address);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// The program of the process that is ended.
pub(crate) fn be_a_host(address: &str) -> ExitCode {
    let way = std::env::args().nth(1).unwrap_or_default();
    let host = DockerHost { address: address.to_owned(), certificates: None };
    block_on(async {
        let options = DockerOptions { host, ..DockerOptions::default() };
        let backend = DockerBackend::connect(options, &|_| {}).await.unwrap();
        match &*way {
            "cycles" => {
                for n in 0..20 {
                    let mut session = open(&backend).await;
                    let code = format!("print({n})");
                    assert_eq!(print(&mut session, &code).await, format!("{n}\n"));
                    session.close().await.unwrap();
                }
                return;
            }
            "wait" => {
                let _session = open(&backend).await;
                println!("open");
                tokio::time::sleep(Duration::from_secs(600)).await;
            }
            "drop" => drop(open(&backend).await),
            "panic" => {
                let backend = backend.clone();
                let task = tokio::spawn(async move {
                    let mut session = open(&backend).await;
                    session.execute("x = 1").await.unwrap();
                    panic!("on purpose");
                });
                assert!(task.await.unwrap_err().is_panic());
            }
            _ => {
                // At different moments of the start.
                for wait in [1, 5, 20, 60, 110] {
                    let opening = backend.open(EnvironmentOptions::default());
                    let _ = tokio::time::timeout(Duration::from_millis(wait), opening).await;
                }
            }
        }
        println!("dropped");
        // Until its parent has looked.
        let wait = tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop));
        wait.await.unwrap();
    });
    ExitCode::SUCCESS
}
