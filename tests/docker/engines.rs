//! Engines that aren't there, aren't engines, or go away.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bollard::body_full;
use bollard::query_parameters::ImportImageOptions;
use futures_util::StreamExt;
use kaa::docker::{DockerBackend, DockerHost, DockerOptions, Pull};
use kaa::{EnvironmentExt, Error, Status};

use crate::{Lab, block_on, lab, open, print, until};

fn at(socket: &Path) -> DockerOptions {
    let host = DockerHost { address: format!("unix://{}", socket.display()), certificates: None };
    DockerOptions { host, ..DockerOptions::default() }
}

/// What connecting there ends with, within the deadline.
fn refusal(socket: &Path) -> Error {
    let since = Instant::now();
    let error = block_on(DockerBackend::connect(at(socket), &|_| {})).unwrap_err();
    assert!(since.elapsed() < Duration::from_secs(8), "{:?}", since.elapsed());
    assert!(error.to_string().contains(socket.to_str().unwrap()), "{error}");
    error
}

pub(crate) fn missing() {
    let root = tempfile::tempdir().unwrap();
    let socket = root.path().join("d.sock");
    let error = refusal(&socket);
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(error.to_string().contains("there is no such socket"), "{error}");

    drop(UnixListener::bind(&socket).unwrap());
    let error = refusal(&socket);
    assert!(error.to_string().contains("nobody listens there"), "{error}");
}

/// Answers every request with this, and hangs up or doesn't.
fn serve(socket: &Path, answer: &'static str, holds: bool) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        let mut held = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer.as_bytes());
            if holds {
                held.push(stream);
            }
        }
    });
}

pub(crate) fn silent() {
    let root = tempfile::tempdir().unwrap();
    for (name, answer) in [
        ("a.sock", ""),
        // It begins to answer, and never ends.
        ("b.sock", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"),
    ] {
        let socket = root.path().join(name);
        serve(&socket, answer, true);
        let error = refusal(&socket);
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        assert!(error.to_string().contains("did not answer within 5 s"), "{error}");
    }
}

pub(crate) fn odd() {
    let root = tempfile::tempdir().unwrap();
    for (name, answer, part) in [
        (
            "old.sock",
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
             {\"ApiVersion\": \"1.30\", \"Version\": \"17.06.0-ce\"}",
            "expected API 1.41 or newer (Docker 20.10), found API 1.30 (version 17.06.0-ce)",
        ),
        (
            "web.sock",
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html>hello</html>",
            "expected the API of a Docker engine",
        ),
        (
            "lost.sock",
            "HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\nno such page",
            "status 404: no such page",
        ),
        ("other.sock", "220 mail.example ESMTP\r\n", "expected the API of a Docker engine"),
    ] {
        let socket = root.path().join(name);
        serve(&socket, answer, false);
        let error = refusal(&socket);
        assert!(matches!(error, Error::Incompatible { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(part), "{name}: {error}");
    }
}

/// An engine of the test's own, which may be killed.
struct Own {
    root: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Own {
    fn socket(&self) -> std::path::PathBuf {
        self.root.path().join("d.sock")
    }

    /// Starts it, again. `Err` where that isn't possible: not root, no dockerd.
    fn start(&mut self) -> Result<(), String> {
        let path = |name: &str| self.root.path().join(name);
        // What a killed engine leaves keeps the next one from starting.
        for file in ["docker.pid", "exec/containerd/containerd.pid"] {
            let _ = std::fs::remove_file(path(file));
        }
        let mut command = Command::new("dockerd");
        command.arg("-H").arg(format!("unix://{}", self.socket().display()));
        command.arg("--data-root").arg(path("data")).arg("--exec-root").arg(path("exec"));
        command.arg("-p").arg(path("docker.pid"));
        // It shares the bridge with the engine that is there: without one it would remove that.
        command.args(["--iptables=false", "--ip-forward=false", "--ip-masq=false"]);
        // Not the system's settings.
        std::fs::write(path("daemon.json"), "{}").unwrap();
        command.arg("--config-file").arg(path("daemon.json"));
        let log = std::fs::File::create(path("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = command.spawn().map_err(|error| format!("dockerd: {error}"))?;
        self.daemon = Some(daemon);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let is_up = std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
                && block_on(lab::api(&at(&self.socket()).host).version()).is_ok();
            if is_up {
                return Ok(());
            }
            let ended = self.daemon.as_mut().unwrap().try_wait().unwrap().is_some();
            if ended || Instant::now() > deadline {
                let log = std::fs::read_to_string(path("log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or_default();
                return Err(format!("no engine of its own could be started: {last}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn signal(&mut self, signal: &str) {
        let Some(mut daemon) = self.daemon.take() else { return };
        let mut command = Command::new("kill");
        command.arg(format!("-{signal}")).arg(daemon.id().to_string());
        command.status().unwrap();
        daemon.wait().unwrap();
    }

    /// Ends its containerd, which outlives a killed engine.
    fn end(&mut self) {
        self.signal("TERM");
        let pid = std::fs::read_to_string(self.root.path().join("exec/containerd/containerd.pid"));
        if let Ok(pid) = pid {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.end();
        // What a killed engine had mounted.
        for name in ["exec", "data"] {
            let mut command = Command::new("umount");
            command.arg("-R").arg(self.root.path().join(name)).stderr(Stdio::null());
            let _ = command.status();
        }
    }
}

pub(crate) fn killed(lab: &Lab) {
    // A path that is short enough for a socket.
    let root = tempfile::Builder::new().prefix("kaa-").tempdir_in("/var/tmp").unwrap();
    let mut own = Own { root, daemon: None };
    let is_root = std::fs::metadata("/proc/self")
        .is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
    if !is_root || own.start().is_err() {
        let started = if is_root { own.start() } else { Err("only root starts engines".into()) };
        let required = std::env::var("KAA_REQUIRE").unwrap_or_default().contains(crate::SUITE);
        assert!(!required, "{started:?}");
        println!("without an engine of its own: {started:?}");
        return;
    }
    block_on(async {
        let mut image = Vec::new();
        let mut export = lab.api.export_image("python:3.11-slim");
        while let Some(chunk) = export.next().await {
            image.extend_from_slice(&chunk.unwrap());
        }
        let api = lab::api(&at(&own.socket()).host);
        let mut import =
            api.import_image(ImportImageOptions::default(), body_full(image.into()), None);
        while let Some(step) = import.next().await {
            step.unwrap();
        }
    });
    for signal in ["KILL", "TERM"] {
        let options = DockerOptions { pull: Pull::Never, ..at(&own.socket()) };
        let backend = block_on(DockerBackend::connect(options, &|_| {})).unwrap();
        let mut session = block_on(open(&backend));
        assert_eq!(block_on(print(&mut session, "x = 1; print(x)")), "1\n");
        let since = Instant::now();
        let cell = thread::spawn(move || {
            let ended = block_on(session.execute("import time; time.sleep(60)"));
            (session, ended)
        });
        thread::sleep(Duration::from_millis(300));
        own.signal(signal);
        let (mut session, ended) = cell.join().unwrap();
        let error = ended.unwrap_err().to_string();
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}: {error}", since.elapsed());
        let expected = ["went away", "was restarted", "stopped the container"];
        assert!(expected.iter().any(|part| error.contains(part)), "{signal}: {error}");
        assert_eq!(session.status(), Status::Poisoned);
        let error = block_on(session.reset()).unwrap_err().to_string();
        assert!(error.contains("start the engine"), "{error}");

        own.start().unwrap();
        block_on(async {
            session.reset().await.unwrap();
            assert_eq!(print(&mut session, "print('x' in globals())").await, "False\n");
            let api = lab::api(&at(&own.socket()).host);
            let count = || async {
                let all = bollard::query_parameters::ListContainersOptions {
                    all: true,
                    ..Default::default()
                };
                api.list_containers(Some(all)).await.unwrap().len()
            };
            let most = Duration::from_secs(20);
            until("only the new container is left", most, || async { count().await == 1 }).await;
            session.close().await.unwrap();
            assert_eq!(count().await, 0);
        });
    }
}
