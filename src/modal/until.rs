//! A stream that ends when the sandbox does, though its connection may not have noticed, or when the
//! stream of the other direction is lost.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::watch;

use super::ending::Ending;
use super::fault::Fault;

/// What may still arrive of a sandbox that has ended, or takes nothing more.
const DRAIN_TIME: Duration = Duration::from_secs(1);

type Ended = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A stream, and the end of what it comes from.
pub(super) struct Until<S> {
    stream: S,
    ended: Ended,
}

impl<S> Until<S> {
    /// `ending` tells of the sandbox, `lost` of the streams of the process.
    pub(super) fn new(
        stream: S,
        ending: watch::Receiver<Option<Ending>>,
        lost: watch::Receiver<Option<Fault>>,
    ) -> Self {
        let ended = async move {
            tokio::select! {
                () = some(ending) => {}
                () = some(lost) => {}
            }
            tokio::time::sleep(DRAIN_TIME).await;
        };
        Self { stream, ended: Box::pin(ended) }
    }
}

/// Waits until there is something.
async fn some<T>(mut news: watch::Receiver<Option<T>>) {
    if news.wait_for(Option::is_some).await.is_err() {
        // Nobody is left who could tell.
        std::future::pending::<()>().await;
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
