//! The client itself: sandboxes, processes in them, snapshots of their files.

use kaa::modal::{ModalImage, Network, ProcessExit, SandboxSpec, Secret};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{client, running, stand_in};

async fn text(stream: Option<impl tokio::io::AsyncRead + Unpin>) -> String {
    let mut text = String::new();
    stream.expect("it's the first time").read_to_string(&mut text).await.expect("UTF-8");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_has_streams_and_an_end() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let secret = Secret::Variable { name: "FROM_SECRET".into(), value: "s".into() };
    let spec = SandboxSpec {
        secrets: vec![secret],
        image: ModalImage::default().env([("FROM_IMAGE", "i")]),
        ..SandboxSpec::default()
    };
    let sandbox = client.create_sandbox(&spec, &|_| {}).await.expect("a sandbox");
    let env = [("FROM_EXEC".to_owned(), "e".to_owned())];
    let script = "cat; echo $FROM_SECRET$FROM_IMAGE$FROM_EXEC >&2; exit 7";
    let mut process = sandbox.exec(&["sh", "-c", script], &env).await.expect("a process");
    let mut stdin = process.stdin().expect("it's the first time");
    stdin.write_all(b"one ").await.expect("written");
    stdin.write_all(b"two").await.expect("written");
    drop(stdin);
    assert!(process.stdin().is_none());
    assert_eq!(text(process.stdout()).await, "one two");
    assert_eq!(text(process.stderr()).await, "sie\n");
    assert_eq!(process.wait().await.expect("its end"), ProcessExit::Code(7));
    let killed = sandbox.exec(&["sh", "-c", "kill -9 $$"], &[]).await.expect("a process");
    assert_eq!(killed.wait().await.expect("its end"), ProcessExit::Signal(9));
    let long = "x".repeat(70_000);
    let error = sandbox.exec(&["echo", &long], &[]).await.expect_err("too long").to_string();
    assert!(error.contains("65536"), "{error}");
    sandbox.terminate().await.expect("its end");
    assert!(sandbox.wait().await.expect("how it ended").contains("somebody"));
    let error = sandbox.exec(&["true"], &[]).await.expect_err("it's over").to_string();
    assert!(error.contains("somebody"), "{error}");
    assert_eq!(running(&stand_in), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_outlive_their_sandbox_in_a_snapshot() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let spec = SandboxSpec::default();
    let sandbox = client.create_sandbox(&spec, &|_| {}).await.expect("a sandbox");
    let process = sandbox.exec(&["sh", "-c", "echo kept > file"], &[]).await.expect("a process");
    assert_eq!(process.wait().await.expect("its end"), ProcessExit::Code(0));
    let same = client.sandbox(sandbox.id()).await.expect("it's there");
    let image = same.snapshot_filesystem(None).await.expect("an image");
    sandbox.terminate().await.expect("its end");
    let spec = SandboxSpec { image: ModalImage::from_id(&image), ..spec };
    let other = client.create_sandbox(&spec, &|_| {}).await.expect("another sandbox");
    let mut process = other.exec(&["cat", "file"], &[]).await.expect("a process");
    assert_eq!(text(process.stdout()).await, "kept\n");
    other.terminate().await.expect("its end");
    let error = client.sandbox(sandbox.id()).await.expect_err("it's over").to_string();
    assert!(error.contains("somebody"), "{error}");
    let error = client.sandbox("sb-nobody").await.expect_err("there is none").to_string();
    assert!(error.contains("sb-nobody"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_leads_to_a_port_that_was_asked_for() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let blocked = SandboxSpec { ports: vec![8080], ..SandboxSpec::default() };
    let error = client.create_sandbox(&blocked, &|_| {}).await.expect_err("refused").to_string();
    assert!(error.starts_with("modal.network"), "{error}");
    let network = Network::Allow { cidrs: Vec::new(), domains: Vec::new() };
    let spec = SandboxSpec { network, ..blocked };
    let sandbox = client.create_sandbox(&spec, &|_| {}).await.expect("a sandbox");
    let url = sandbox.tunnel(8080).await.expect("an address");
    assert!(url.starts_with("https://"), "{url}");
    let error = sandbox.tunnel(9090).await.expect_err("there is none").to_string();
    assert!(error.contains("9090"), "{error}");
    sandbox.terminate().await.expect("its end");
}
