//! Bytes from a process in a sandbox: each of them once, whatever becomes of the connection.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tonic::Code;

use super::fault::Fault;
use super::retry::{Persistence, Rules};
use super::router::{Descriptor, Router};

/// A process's stdout or stderr, seen from here.
pub(super) struct Output {
    pub(super) router: Arc<Router>,
    pub(super) exec: String,
    pub(super) descriptor: Descriptor,
    pub(super) sink: DuplexStream,
    pub(super) patience: Duration,
}

impl Output {
    /// Carries everything up to the end of the stream, or until nobody reads any more.
    ///
    /// # Errors
    ///
    /// The fault that could not be mended in time.
    pub(super) async fn run(mut self) -> Result<(), Fault> {
        let mut persistence = Persistence::new(Rules::router(None).patient(self.patience));
        let (mut offset, mut is_refreshed) = (0, false);
        loop {
            let before = offset;
            let fault = match self.follow(&mut offset).await {
                Ok(()) => return Ok(()),
                Err(fault) => fault,
            };
            if offset > before {
                persistence.progressed();
                is_refreshed = false;
            }
            if fault.code == Code::Unauthenticated && !is_refreshed {
                self.router.refresh().await?;
                is_refreshed = true;
                continue;
            }
            let Some(pause) = persistence.pause(&fault) else { return Err(fault) };
            tokio::time::sleep(pause).await;
        }
    }

    /// Reads from an offset on, for as long as the connection lasts.
    async fn follow(&mut self, offset: &mut u64) -> Result<(), Fault> {
        let mut stream = self.router.read(&self.exec, *offset, self.descriptor).await?;
        while let Some(message) = stream.next().await {
            let data = message?.data;
            if self.sink.write_all(&data).await.is_err() {
                return Ok(());
            }
            *offset += data.len() as u64;
        }
        // What stays unsaid now was said by nobody: a clean end of the call is the end of the stream.
        Ok(())
    }
}
