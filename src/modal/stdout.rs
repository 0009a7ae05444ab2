//! Bytes from a process in a sandbox: each of them once, whatever becomes of the connection.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use tokio::io::{AsyncWriteExt, DuplexStream};

use super::fault::Fault;
use super::retry::{Persistence, Rules, WORKED_TIME};
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
        let mut offset = 0;
        loop {
            let (before, mut opened) = (offset, None);
            let pass = self.router.pass().await;
            let fault = match self.follow(&mut offset, &mut opened).await {
                Ok(()) => return Ok(()),
                Err(fault) => fault,
            };
            let lasted = opened.map(|since: Instant| since.elapsed());
            if offset > before || lasted.is_some_and(|lasted| lasted > WORKED_TIME) {
                persistence.progressed();
            }
            self.router.recover(&mut persistence, &pass, fault).await?;
        }
    }

    /// Reads from an offset on, for as long as the connection lasts.
    async fn follow(
        &mut self,
        offset: &mut u64,
        opened: &mut Option<Instant>,
    ) -> Result<(), Fault> {
        let mut stream = self.router.read(&self.exec, *offset, self.descriptor).await?;
        *opened = Some(Instant::now());
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
