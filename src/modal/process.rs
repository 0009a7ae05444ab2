//! A process in a sandbox, with its streams.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::task::AbortHandle;

use super::client::ModalClient;
use super::router::{Descriptor, ProcessExit, Router};
use super::stdin::Stdin;
use super::stdout::Output;
use crate::error::Result;

/// Bytes between a stream of a process and the connection.
const PIPE_BYTES: usize = 1 << 20;

/// A process in a sandbox, with its streams. Dropping it lets go of the streams and closes its stdin;
/// the process goes on.
pub struct SandboxProcess {
    router: Arc<Router>,
    client: ModalClient,
    exec: String,
    stdin: Option<DuplexStream>,
    stdout: DuplexStream,
    stderr: DuplexStream,
    carriers: Vec<AbortHandle>,
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
        let (stdin, far) = tokio::io::duplex(PIPE_BYTES);
        let carried = Stdin::new(Arc::clone(router), exec.to_owned(), far, patience);
        // It ends by itself, with the end of what it carries: a process whose stdin is dropped is told.
        tokio::spawn(carried.run());
        let mut carriers = Vec::new();
        let mut output = |descriptor| {
            let (near, sink) = tokio::io::duplex(PIPE_BYTES);
            let (router, exec) = (Arc::clone(router), exec.to_owned());
            let output = Output { router, exec, descriptor, sink, patience };
            carriers.push(tokio::spawn(output.run()).abort_handle());
            near
        };
        let (stdout, stderr) = (output(Descriptor::Stdout), output(Descriptor::Stderr));
        let (router, client, exec) = (Arc::clone(router), client.clone(), exec.to_owned());
        Self { router, client, exec, stdin: Some(stdin), stdout, stderr, carriers }
    }

    /// Its stdin, once. Dropping that closes it.
    pub fn stdin(&mut self) -> Option<impl AsyncWrite + Send + Sync + Unpin + 'static> {
        self.stdin.take()
    }

    /// What it writes to stdout.
    pub fn stdout(&mut self) -> &mut (impl AsyncRead + Send + Sync + Unpin + 'static) {
        &mut self.stdout
    }

    /// What it writes to stderr.
    pub fn stderr(&mut self) -> &mut (impl AsyncRead + Send + Sync + Unpin + 'static) {
        &mut self.stderr
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when the sandbox has ended before, or Modal doesn't answer.
    pub async fn wait(&self) -> Result<ProcessExit> {
        let waited = self.router.wait(&self.exec).await;
        waited.map_err(|fault| self.client.explain(&fault, "a process in the Modal sandbox"))
    }

    /// How it ended, if it has.
    pub(super) async fn poll(&self) -> Option<ProcessExit> {
        self.router.poll(&self.exec).await.ok().flatten()
    }

    /// Its stdin, which stays open.
    pub(super) fn stdin_mut(&mut self) -> Option<&mut DuplexStream> {
        self.stdin.as_mut()
    }

    /// Takes the streams that a session is carried by.
    pub(super) fn take_streams(&mut self) -> (DuplexStream, Option<DuplexStream>) {
        (std::mem::replace(&mut self.stdout, tokio::io::duplex(1).0), self.stdin.take())
    }
}

impl Drop for SandboxProcess {
    fn drop(&mut self) {
        self.carriers.iter().for_each(AbortHandle::abort);
    }
}
