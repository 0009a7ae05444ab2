//! The streams of a process in a sandbox: each of its own, beside the others.

use std::time::Duration;

use kaa::modal::{ProcessExit, SandboxSpec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{client, stand_in};

async fn bytes(stream: Option<impl tokio::io::AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut stream = stream.expect("it's the first time");
    stream.read_to_end(&mut bytes).await.expect("the end");
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_read_side_by_side_while_the_end_is_awaited() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let sandbox = client.create_sandbox(&SandboxSpec::default(), &|_| {}).await.expect("it");
    let script = "head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero; cat; exit 3";
    let mut process = sandbox.exec(&["sh", "-c", script], &[]).await.expect("a process");
    let (stdin, stdout, stderr) = (process.stdin(), process.stdout(), process.stderr());
    assert!(process.stdin().is_none() && process.stdout().is_none() && process.stderr().is_none());
    let writing = async {
        let mut stdin = stdin.expect("it's the first time");
        stdin.write_all(b"the end").await.expect("written");
    };
    let (out, error, exit, ()) =
        tokio::join!(bytes(stdout), bytes(stderr), process.wait(), writing);
    assert_eq!((out.len(), error.len()), (3_000_007, 3_000_000));
    assert!(out.ends_with(b"the end"));
    assert_eq!(exit.expect("its end"), ProcessExit::Code(3));
    // A stream is its taker's, whatever becomes of the process.
    let stdout = {
        let mut process = sandbox.exec(&["sh", "-c", "sleep 0.3; echo late"], &[]).await;
        process.as_mut().expect("a process").stdout()
    };
    assert_eq!(bytes(stdout).await, b"late\n");
    sandbox.terminate().await.expect("its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_reads_holds_up_no_other() {
    let stand_in = stand_in().await;
    let client = client(&stand_in).await;
    let sandbox = client.create_sandbox(&SandboxSpec::default(), &|_| {}).await.expect("it");
    let loud = sandbox.exec(&["head", "-c", "40000000", "/dev/zero"], &[]).await.expect("it");
    loud.wait().await.expect("its end");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let quiet = async {
        let mut process = sandbox.exec(&["echo", "heard"], &[]).await.expect("a process");
        bytes(process.stdout()).await
    };
    let heard = tokio::time::timeout(Duration::from_secs(5), quiet).await;
    assert_eq!(heard.expect("it isn't held up"), b"heard\n");
    sandbox.terminate().await.expect("its end");
}
