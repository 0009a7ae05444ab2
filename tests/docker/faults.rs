//! How a container fails a session, and an image: each by its name, with what helps.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bollard::body_full;
use bollard::query_parameters::{
    BuildImageOptionsBuilder, ListContainersOptions, RemoveContainerOptions, RemoveImageOptions,
};
use futures_util::StreamExt;
use kaa::docker::{DockerBackend, DockerOptions, Pull};
use kaa::{Backend, EnvironmentExt, EnvironmentOptions, Error, Limits, Progress, Status};
use sha2::{Digest, Sha256};

use crate::{Lab, block_on, open, print};

/// A tar of these files, all of them executable.
fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = root.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut tar = Command::new("tar");
    tar.args(["-c", "--owner=0", "--group=0", "-C"]).arg(root.path()).arg(".");
    tar.output().unwrap().stdout
}

/// Makes the image `kaa-test:TAG`.
pub(crate) async fn build(lab: &Lab, tag: &str, dockerfile: &str, files: &[(&str, &str)]) {
    let files = [&[("Dockerfile", dockerfile)], files].concat();
    let name = format!("kaa-test:{tag}");
    let options = BuildImageOptionsBuilder::default().t(&name).rm(true).build();
    let body = body_full(archive(&files).into());
    let mut steps = lab.api.build_image(options, None, Some(body));
    while let Some(step) = steps.next().await {
        step.unwrap();
    }
}

pub(crate) fn removed(lab: &Lab) {
    block_on(async {
        let mut session = open(&lab.backend).await;
        let label = print(&mut session, "open('/tmp/kaa-find-me', 'w'); print('ready')").await;
        assert_eq!(label, "ready\n");
        // Of all sessions of this process it's the one whose scratch has the file.
        let id = find(lab, "/tmp/kaa-find-me").await;
        let remove = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let query = RemoveContainerOptions { force: true, ..Default::default() };
            lab.api.remove_container(&id, Some(query)).await.unwrap();
        };
        let (ended, ()) = tokio::join!(session.execute("import time; time.sleep(60)"), remove);
        let error = ended.unwrap_err();
        assert!(error.to_string().contains("somebody stopped the container"), "{error}");
        assert_eq!(session.status(), Status::Poisoned);
        session.reset().await.unwrap();
        assert_eq!(print(&mut session, "print(1)").await, "1\n");
        session.close().await.unwrap();
    });
}

/// The container that has this file.
async fn find(lab: &Lab, path: &str) -> String {
    let filters = HashMap::from([("label".to_owned(), vec!["kaa.owner".to_owned()])]);
    let options = ListContainersOptions { filters: Some(filters), ..Default::default() };
    for container in lab.api.list_containers(Some(options)).await.unwrap() {
        let id = container.id.unwrap();
        let exec = bollard::models::ExecConfig {
            attach_stdout: Some(true),
            cmd: Some(
                ["python3", "-c", "import os,sys; sys.exit(not os.path.exists(sys.argv[1]))"]
                    .into_iter()
                    .chain([path])
                    .map(str::to_owned)
                    .collect(),
            ),
            ..Default::default()
        };
        let Ok(exec) = lab.api.create_exec(&id, exec).await else { continue };
        if let Ok(bollard::exec::StartExecResults::Attached { mut output, .. }) =
            lab.api.start_exec(&exec.id, None).await
        {
            while output.next().await.is_some() {}
        }
        let ended = lab.api.inspect_exec(&exec.id).await;
        if ended.is_ok_and(|ended| ended.exit_code == Some(0)) {
            return id;
        }
    }
    panic!("no container has {path}");
}

const HUNGRY: &str =
    "#!/usr/bin/env python3\nhoard = []\nwhile True:\n    hoard.append(bytearray(1 << 24))\n";
const OLD: &str = "#!/bin/sh\necho '  File \"<string>\", line 1' >&2\necho 'SyntaxError: invalid syntax' >&2\nexit 1\n";

async fn broken_pythons(lab: &Lab) {
    let dockerfile = "FROM python:3.11-slim\nCOPY hungry old /opt/\n";
    build(lab, "pythons", dockerfile, &[("hungry", HUNGRY), ("old", OLD)]).await;
}

async fn refusal(lab: &Lab, python: &str) -> (Error, Duration) {
    let image = "kaa-test:pythons".to_owned();
    let options = DockerOptions { image, python: python.into(), ..lab.options() };
    let backend = lab.connect(options).await;
    let since = Instant::now();
    let limits = Limits { memory_bytes: 64 << 20, disk_bytes: 1 << 20, ..Limits::default() };
    let options = EnvironmentOptions { limits, ..EnvironmentOptions::default() };
    let Err(error) = backend.open(options).await else { panic!("{python} was taken") };
    (error, since.elapsed())
}

pub(crate) fn oom(lab: &Lab) {
    block_on(async {
        broken_pythons(lab).await;
        let (error, elapsed) = refusal(lab, "/opt/hungry").await;
        let text = error.to_string();
        assert!(text.contains("out of memory") && text.contains("67108864"), "{text}");
        assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
    });
}

pub(crate) fn no_python(lab: &Lab) {
    block_on(async {
        broken_pythons(lab).await;
        for (python, part) in [
            ("/opt/none", "/opt/none"),
            ("python9", "python9"),
            ("/opt/old", "SyntaxError: invalid syntax"),
            ("/etc", "/etc"),
        ] {
            let (error, elapsed) = refusal(lab, python).await;
            assert!(matches!(error, Error::Incompatible { .. }), "{python}: {error:?}");
            let text = error.to_string();
            assert!(text.contains("kaa-test:pythons") && text.contains(part), "{text}");
            assert!(text.contains("Python 3.9 or newer"), "{text}");
            assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
        }
    });
}

pub(crate) fn no_image(lab: &Lab) {
    block_on(async {
        // A registry on the loopback that isn't there: nothing is asked of anybody else.
        let image = "127.0.0.1:9/kaa-none:1".to_owned();
        for (pull, part) in [(Pull::Missing, "could not pull it"), (Pull::Never, "not be pulled")] {
            let since = Instant::now();
            let options = DockerOptions { image: image.clone(), pull, ..lab.options() };
            let error = DockerBackend::connect(options, &|_| {}).await.unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(part) && text.contains(&image), "{text}");
            assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
        }
    });
}

pub(crate) fn lacking(lab: &Lab) {
    block_on(async {
        for (options, part) in [
            (DockerOptions { runtime: Some("kaa-none".into()), ..lab.options() }, "`kaa-none`"),
            (DockerOptions { cpus: 4096.0, ..lab.options() }, "docker.cpus"),
            (DockerOptions { pids: 1, ..lab.options() }, "docker.pids"),
            (DockerOptions { user: String::new(), ..lab.options() }, "docker.user"),
        ] {
            let error = DockerBackend::connect(options, &|_| {}).await.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        // A user that the image doesn't have is known only when a container starts.
        let options = DockerOptions { user: "kaa-nobody-knows".into(), ..lab.options() };
        let backend = lab.connect(options).await;
        let error = backend.open(EnvironmentOptions::default()).await.err().unwrap().to_string();
        assert!(error.contains("kaa-nobody-knows"), "{error}");
    });
}

/// A registry with one image, on the loopback, where engines take plain HTTP.
struct Registry {
    name: String,
    requests: AtomicUsize,
}

fn digest(bytes: &[u8]) -> String {
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hash}")
}

impl Registry {
    fn start() -> &'static Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let layer = archive(&[("readme", &"no python here\n".repeat(100_000))]);
        let config = serde_json::json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {},
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        });
        let config = config.to_string().into_bytes();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "size": config.len(),
                "digest": digest(&config),
            },
            "layers": [{
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "size": layer.len(),
                "digest": digest(&layer),
            }],
        });
        let manifest = manifest.to_string().into_bytes();
        let name = format!("{address}/kaa-pulled:1");
        let registry: &'static Self =
            Box::leak(Box::new(Self { name, requests: AtomicUsize::new(0) }));
        thread::spawn(move || {
            for stream in listener.incoming() {
                registry.requests.fetch_add(1, Ordering::Relaxed);
                let things = [&manifest[..], &config, &layer].map(<[u8]>::to_vec);
                thread::spawn(move || serve(stream.unwrap(), &things));
            }
        });
        registry
    }
}

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Answers one request: manifests by any name, everything else by its digest.
fn serve(mut stream: TcpStream, things: &[Vec<u8>; 3]) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read > 0) {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    let found = match path {
        "/v2/" => Some(&b"{}"[..]),
        _ if path.contains("/manifests/") => Some(&things[0][..]),
        _ => things.iter().map(Vec::as_slice).find(|thing| digest(thing) == last),
    };
    let (status, body) = found.map_or(("404 Not Found", &b""[..]), |body| ("200 OK", body));
    let kind = if path.contains("/manifests/") { MANIFEST } else { "application/octet-stream" };
    let head_only = head.starts_with("HEAD");
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Docker-Content-Digest: {}\r\nConnection: close\r\n\r\n",
        body.len(),
        digest(body)
    );
    let body = if head_only { &b""[..] } else { body };
    // The engine may hang up when it has enough.
    let _ = stream.write_all(&[answer.as_bytes(), body].concat());
}

pub(crate) fn pull(lab: &Lab) {
    block_on(async {
        let registry = Registry::start();
        let options = DockerOptions { image: registry.name.clone(), ..lab.options() };
        let heard = Mutex::new(Vec::new());
        let hear = |progress| heard.lock().unwrap().push(progress);
        let backend = DockerBackend::connect(options.clone(), &hear).await.unwrap();
        let heard = heard.into_inner().unwrap();
        assert!(matches!(heard[0], Progress::Begin { step: "pull", .. }), "{heard:?}");
        let is_end = |progress: &Progress| matches!(progress, Progress::End { detail, .. } if detail.contains(&registry.name));
        assert!(heard.last().is_some_and(is_end), "{heard:?}");
        assert!(heard.iter().any(|p| matches!(p, Progress::Advance { bytes: 1.. })), "{heard:?}");

        // It's there now, and not asked for again.
        let requests = registry.requests.load(Ordering::Relaxed);
        DockerBackend::connect(options, &|_| {}).await.unwrap();
        assert_eq!(registry.requests.load(Ordering::Relaxed), requests);

        let error = backend.open(EnvironmentOptions::default()).await.err().unwrap();
        assert!(matches!(error, Error::Incompatible { .. }), "{error:?}");
        assert!(error.to_string().contains(&registry.name), "{error}");

        let query = RemoveImageOptions { force: true, ..Default::default() };
        lab.api.remove_image(&registry.name, Some(query), None).await.unwrap();
        let error = backend.open(EnvironmentOptions::default()).await.err().unwrap();
        assert!(error.to_string().contains("was removed"), "{error}");
    });
}
