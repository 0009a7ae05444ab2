//! The attached streams of a container as what a supervisor's driver reads and writes.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bollard::container::{AttachContainerResults, LogOutput};
use bollard::errors::Error as ApiError;
use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is kept of a container's stderr: its end, to say why it ended.
const STDERR_BYTES_MAX: usize = 8 << 10;

type Output = Pin<Box<dyn Stream<Item = Result<LogOutput, ApiError>> + Send>>;
type Input = Pin<Box<dyn AsyncWrite + Send>>;

/// What was seen of a container's output.
#[derive(Debug, Default)]
pub(super) struct Seen {
    has_stdout: AtomicBool,
    stderr: Mutex<VecDeque<u8>>,
}

impl Seen {
    /// Whether it ever wrote to its stdout.
    pub(super) fn has_stdout(&self) -> bool {
        self.has_stdout.load(Ordering::Relaxed)
    }

    /// The end of its stderr.
    pub(super) fn stderr(&self) -> String {
        let bytes: Vec<u8> = self.tail().iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn keep(&self, bytes: &[u8]) {
        let mut tail = self.tail();
        let bytes = &bytes[bytes.len().saturating_sub(STDERR_BYTES_MAX)..];
        let excess = (tail.len() + bytes.len()).saturating_sub(STDERR_BYTES_MAX);
        tail.drain(..excess);
        tail.extend(bytes);
    }

    fn tail(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The container's stdout. The mutexes here and below are never locked: they make what only one task
/// at a time can use into something that may be shared.
pub(super) struct Stdout {
    output: Mutex<Output>,
    /// What was received and not read yet. The engine sends 32 KiB at a time at most.
    chunk: Option<LogOutput>,
    at: usize,
    seen: Arc<Seen>,
}

/// The container's stdin.
pub(super) struct Stdin(Mutex<Input>);

pub(super) fn split(attached: AttachContainerResults) -> (Stdout, Stdin, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let output = Mutex::new(attached.output);
    let stdout = Stdout { output, chunk: None, at: 0, seen: Arc::clone(&seen) };
    (stdout, Stdin(Mutex::new(attached.input)), seen)
}

fn inner<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(PoisonError::into_inner)
}

fn to_io(error: ApiError) -> io::Error {
    match error {
        ApiError::IOError { err } => err,
        error => io::Error::other(error),
    }
}

impl AsyncRead for Stdout {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if let Some(chunk) = &this.chunk {
                let rest = &chunk.as_ref()[this.at..];
                let taken = rest.len().min(buffer.remaining());
                buffer.put_slice(&rest[..taken]);
                this.at += taken;
                if taken == rest.len() {
                    this.chunk = None;
                }
                // An empty read would be taken for the end.
                if taken > 0 || buffer.remaining() == 0 {
                    return Poll::Ready(Ok(()));
                }
            }
            match inner(&mut this.output).as_mut().poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(to_io(error))),
                Poll::Ready(Some(Ok(LogOutput::StdErr { message }))) => this.seen.keep(&message),
                Poll::Ready(Some(Ok(chunk))) => {
                    this.seen.has_stdout.store(true, Ordering::Relaxed);
                    (this.chunk, this.at) = (Some(chunk), 0);
                }
            }
        }
    }
}

impl AsyncWrite for Stdin {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        inner(&mut self.0).as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner(&mut self.0).as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner(&mut self.0).as_mut().poll_shutdown(cx)
    }
}

/// The end of the input is the end of the container. The connection has a second owner, the reader, so
/// that it's said and not only let go of; a socket takes it at once, without anybody to wake.
impl Drop for Stdin {
    fn drop(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let _ = inner(&mut self.0).as_mut().poll_shutdown(&mut cx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_stderr_only_the_end_is_kept() {
        let seen = Seen::default();
        seen.keep(b"begin ");
        seen.keep(&[b'x'; STDERR_BYTES_MAX - 3]);
        seen.keep(b"end");
        assert_eq!(seen.stderr(), "x".repeat(STDERR_BYTES_MAX - 3) + "end");
        seen.keep(&[b'y'; 3 * STDERR_BYTES_MAX]);
        assert_eq!(seen.stderr(), "y".repeat(STDERR_BYTES_MAX));
        assert!(!seen.has_stdout());
    }
}
