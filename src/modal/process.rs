//! A process in a sandbox, with its streams.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::client::ModalClient;
use super::fault::Fault;
use super::router::{Descriptor, ProcessExit, Router};
use super::stdin::Stdin;
use super::stdout::Output;
use crate::error::Result;

/// Bytes between a stream of a process and the connection.
const PIPE_BYTES: usize = 1 << 20;

/// A process in a sandbox, with its streams. Dropping it lets go of those that weren't taken, which closes
/// its stdin; the process goes on.
///
/// What it writes is best read as it comes: how much Modal keeps of what nobody reads isn't known.
pub struct SandboxProcess {
    router: Arc<Router>,
    client: ModalClient,
    exec: String,
    stdin: Option<DuplexStream>,
    stdout: Option<ProcessOutput>,
    stderr: Option<ProcessOutput>,
    /// Why one of the streams is lost, once it is.
    lost: watch::Receiver<Option<Fault>>,
    patience: Duration,
}

/// What a process writes to one of its streams. It's carried for as long as somebody has it.
struct ProcessOutput {
    stream: DuplexStream,
    carrier: AbortHandle,
}

impl std::fmt::Debug for SandboxProcess {
    /// Not what is in its streams.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SandboxProcess").field("exec", &self.exec).finish_non_exhaustive()
    }
}

impl SandboxProcess {
    /// The process of this id, whose streams are carried from now on.
    pub(super) fn new(
        client: &ModalClient,
        router: &Arc<Router>,
        exec: &str,
        patience: Duration,
    ) -> Self {
        let (lose, lost) = watch::channel(None);
        let (stdin, far) = tokio::io::duplex(PIPE_BYTES);
        let stdin_carrier = Stdin::new(Arc::clone(router), exec.to_owned(), far, patience);
        // It ends by itself, with the end of what it carries: a process whose stdin is dropped is told.
        tokio::spawn(carried(stdin_carrier.run(), lose.clone()));
        let output = |descriptor| {
            let (stream, sink) = tokio::io::duplex(PIPE_BYTES);
            let (router, exec) = (Arc::clone(router), exec.to_owned());
            let output = Output { router, exec, descriptor, sink, patience };
            let carrier = tokio::spawn(carried(output.run(), lose.clone())).abort_handle();
            Some(ProcessOutput { stream, carrier })
        };
        Self {
            router: Arc::clone(router),
            client: client.clone(),
            exec: exec.to_owned(),
            stdin: Some(stdin),
            stdout: output(Descriptor::Stdout),
            stderr: output(Descriptor::Stderr),
            lost,
            patience,
        }
    }

    /// Its stdin, once. Dropping that closes it.
    pub fn stdin(&mut self) -> Option<impl AsyncWrite + Send + Sync + Unpin + use<>> {
        self.stdin.take()
    }

    /// What it writes to stdout, once. It stays when the process is dropped here.
    pub fn stdout(&mut self) -> Option<impl AsyncRead + Send + Sync + Unpin + use<>> {
        self.stdout.take()
    }

    /// What it writes to stderr, once. It stays when the process is dropped here.
    pub fn stderr(&mut self) -> Option<impl AsyncRead + Send + Sync + Unpin + use<>> {
        self.stderr.take()
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`](crate::Error::Unavailable) when the sandbox has ended before, or Modal
    /// doesn't answer.
    pub async fn wait(&self) -> Result<ProcessExit> {
        let waited = self.router.wait(&self.exec, self.patience).await;
        waited.map_err(|fault| self.client.explain(&fault, "a process in the Modal sandbox"))
    }

    /// How it ended, if it has.
    pub(super) async fn poll(&self) -> Option<ProcessExit> {
        self.router.poll(&self.exec).await.ok().flatten()
    }

    /// Why one of its streams is lost, once it is.
    pub(super) fn lost(&self) -> watch::Receiver<Option<Fault>> {
        self.lost.clone()
    }

    /// Its stdin, which stays open.
    pub(super) fn stdin_mut(&mut self) -> Option<&mut DuplexStream> {
        self.stdin.as_mut()
    }
}

/// Notes why a stream is lost, if it is.
async fn carried(run: impl Future<Output = Result<(), Fault>>, lose: watch::Sender<Option<Fault>>) {
    if let Err(fault) = run.await {
        lose.send_replace(Some(fault));
    }
}

impl AsyncRead for ProcessOutput {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl Drop for ProcessOutput {
    fn drop(&mut self) {
        self.carrier.abort();
    }
}
