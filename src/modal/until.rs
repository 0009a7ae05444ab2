//! A stream that ends when the sandbox does, though its connection may not have noticed.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::watch;

use super::ending::Ending;

/// What may still arrive of a sandbox that has ended.
const DRAIN_TIME: Duration = Duration::from_secs(1);

type Ended = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A stream, and the end of what it comes from.
pub(super) struct Until<S> {
    stream: S,
    ended: Ended,
}

impl<S> Until<S> {
    pub(super) fn new(stream: S, mut ending: watch::Receiver<Option<Ending>>) -> Self {
        let ended = async move {
            if ending.wait_for(Option::is_some).await.is_err() {
                // Nobody watches: the connection alone tells.
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(DRAIN_TIME).await;
        };
        Self { stream, ended: Box::pin(ended) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Until<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(cx, buffer) {
            return Poll::Ready(read);
        }
        // A read of nothing is the end of the stream.
        self.ended.as_mut().poll(cx).map(Ok)
    }
}
