//! Bytes to a process in a sandbox: each of them once, whatever becomes of the connection.
//!
//! They travel on one long call, which takes no round trip for each write. What the worker has of them
//! it says when it's asked; until then they are kept here. A lot of bytes at a time travel in calls of
//! their own, which say so by themselves.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream;
use tokio::io::{AsyncReadExt, DuplexStream};
use tokio::sync::mpsc;
use tonic::Code;

use super::fault::Fault;
use super::proto::task_command_router as wire;
use super::retry::{Persistence, Rules, WORKED_TIME};
use super::router::Router;

/// Bytes that may be on their way on the long call. With more, the worker is asked.
const HELD_BYTES_MAX: usize = 1 << 20;
/// Bytes of one message on it.
const PIECE_BYTES: usize = 256 << 10;
/// Messages that wait for the connection.
const PIECES_WAITING: usize = 4;
/// Bytes of a call of their own.
const CALL_BYTES: usize = 4 << 20;
/// How long more bytes are waited for before such a call is made.
const GATHER_TIME: Duration = Duration::from_millis(2);
/// Shorter pieces are copied: the buffer that they came in is many times as long.
const COPIED_BYTES: usize = 64 << 10;

/// A process's stdin, seen from here.
pub(super) struct Stdin {
    pub(super) router: Arc<Router>,
    pub(super) exec: String,
    pub(super) source: DuplexStream,
    pub(super) patience: Duration,
    /// What the worker may not have, in order; its first byte is at `confirmed`.
    held: VecDeque<Bytes>,
    held_bytes: usize,
    confirmed: u64,
    /// Whether there is nothing more to come.
    is_over: bool,
    /// Whether workers know the long call.
    streams: bool,
    buffer: BytesMut,
}

/// How the long call ended.
enum StreamEnd {
    /// The worker has everything, and the process the end of its stdin.
    Finished,
    /// So much is on its way that the worker has to be asked.
    Full,
    Broken(Fault),
}

impl Stdin {
    pub(super) fn new(
        router: Arc<Router>,
        exec: String,
        source: DuplexStream,
        patience: Duration,
    ) -> Self {
        Self {
            router,
            exec,
            source,
            patience,
            held: VecDeque::new(),
            held_bytes: 0,
            confirmed: 0,
            is_over: false,
            streams: true,
            buffer: BytesMut::new(),
        }
    }

    /// Carries everything, and then says that it was all.
    ///
    /// # Errors
    ///
    /// The fault that could not be mended in time.
    pub(super) async fn run(mut self) -> Result<(), Fault> {
        let mut persistence = Persistence::new(Rules::router(None).patient(self.patience));
        loop {
            if !self.streams {
                return self.run_in_calls().await;
            }
            let (since, before) = (Instant::now(), self.confirmed);
            let pass = self.router.pass().await;
            match self.stream().await {
                StreamEnd::Finished => return Ok(()),
                StreamEnd::Full => {
                    self.confirm().await?;
                    self.send_gathered().await?;
                }
                StreamEnd::Broken(fault) if fault.code == Code::Unimplemented => {
                    self.streams = false;
                }
                StreamEnd::Broken(fault) => {
                    let lasted = since.elapsed();
                    self.router.recover(&mut persistence, &pass, fault).await?;
                    if self.confirm().await? {
                        return Ok(());
                    }
                    // The worker has answered by now, so that the call did get there.
                    if lasted > WORKED_TIME {
                        persistence.progressed();
                    }
                }
            }
            if self.confirmed > before {
                persistence.progressed();
            }
        }
    }

    /// The long call, from what isn't confirmed on.
    async fn stream(&mut self) -> StreamEnd {
        let (sender, mut receiver) = mpsc::channel(PIECES_WAITING);
        let start = self.router.stream_start(&self.exec, self.confirmed);
        let mut unsent: VecDeque<_> = self.held.iter().cloned().map(data).collect();
        unsent.push_front(start);
        let messages = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let router = Arc::clone(&self.router);
        let call = router.write_stream(messages);
        tokio::pin!(call);
        let mut has_ended = false;
        loop {
            if self.is_over && !has_ended {
                unsent.push_back(end());
                has_ended = true;
            }
            if self.held_bytes > HELD_BYTES_MAX && unsent.is_empty() && !has_ended {
                return StreamEnd::Full;
            }
            let may_read = !self.is_over && unsent.len() < PIECES_WAITING;
            tokio::select! {
                biased;
                done = &mut call => return match done {
                    Ok(()) if has_ended && unsent.is_empty() => StreamEnd::Finished,
                    Ok(()) => StreamEnd::Broken(Fault::new(Code::Unavailable, "stdin was let go of")),
                    Err(fault) => StreamEnd::Broken(fault),
                },
                Ok(permit) = sender.reserve(), if !unsent.is_empty() => {
                    if let Some(message) = unsent.pop_front() {
                        permit.send(message);
                    }
                }
                piece = read(&mut self.source, &mut self.buffer), if may_read => {
                    if let Some(piece) = self.keep(piece) {
                        unsent.push_back(data(piece));
                    }
                }
            }
        }
    }

    /// Takes note of a piece that was read; nothing: it was the end.
    fn keep(&mut self, piece: Bytes) -> Option<Bytes> {
        if piece.is_empty() {
            self.is_over = true;
            return None;
        }
        self.held_bytes += piece.len();
        self.held.push_back(piece.clone());
        Some(piece)
    }

    /// Asks the worker what it has. Whether that's everything, and the process was told so.
    async fn confirm(&mut self) -> Result<bool, Fault> {
        let (written, is_closed) = self.router.written(&self.exec, self.patience).await?;
        let Some(new) =
            written.checked_sub(self.confirmed).filter(|new| *new <= self.held_bytes as u64)
        else {
            let text = format!("it has {written} bytes of stdin, which can't be");
            return Err(Fault::new(Code::DataLoss, text));
        };
        self.forget(new as usize);
        if is_closed && !(self.is_over && self.held.is_empty()) {
            return Err(Fault::new(Code::FailedPrecondition, "stdin was closed"));
        }
        Ok(is_closed)
    }

    /// The worker has so many bytes more.
    fn forget(&mut self, bytes: usize) {
        self.confirmed += bytes as u64;
        self.held_bytes -= bytes;
        let mut left = bytes;
        while let Some(front) = self.held.front_mut().filter(|_| left > 0) {
            let taken = front.len().min(left);
            front.advance(taken);
            left -= taken;
            if front.is_empty() {
                self.held.pop_front();
            }
        }
    }

    /// Sends what there is, and what comes right after it, in calls of their own.
    async fn send_gathered(&mut self) -> Result<(), Fault> {
        loop {
            while !self.is_over && self.held_bytes < CALL_BYTES {
                let piece = read(&mut self.source, &mut self.buffer);
                match tokio::time::timeout(GATHER_TIME, piece).await {
                    Ok(piece) => drop(self.keep(piece)),
                    Err(_) => break,
                }
            }
            if self.held.is_empty() {
                return Ok(());
            }
            self.send_held().await?;
        }
    }

    /// One call with what is held.
    async fn send_held(&mut self) -> Result<(), Fault> {
        let bytes = self.held_bytes;
        let mut pieces = BytesMut::with_capacity(bytes);
        self.held.iter().for_each(|piece| pieces.extend_from_slice(piece));
        let pieces = pieces.freeze();
        self.router.write(&self.exec, self.confirmed, pieces, false, self.patience).await?;
        self.forget(bytes);
        Ok(())
    }

    /// Everything in calls of its own: each takes a round trip.
    async fn run_in_calls(&mut self) -> Result<(), Fault> {
        loop {
            if self.held.is_empty() && !self.is_over {
                let piece = read(&mut self.source, &mut self.buffer).await;
                drop(self.keep(piece));
            }
            if self.held.is_empty() && self.is_over {
                let end = Bytes::new();
                return self
                    .router
                    .write(&self.exec, self.confirmed, end, true, self.patience)
                    .await;
            }
            while self.held_bytes < CALL_BYTES && !self.is_over {
                let piece = read(&mut self.source, &mut self.buffer);
                let Some(piece) = futures_util::FutureExt::now_or_never(piece) else { break };
                drop(self.keep(piece));
            }
            self.send_held().await?;
        }
    }
}

/// The next piece; nothing: there are no more. May be dropped.
async fn read(source: &mut DuplexStream, buffer: &mut BytesMut) -> Bytes {
    buffer.reserve(PIECE_BYTES);
    // Nothing else goes wrong with a stream in memory.
    let _ = source.read_buf(buffer).await;
    if buffer.len() > COPIED_BYTES {
        return buffer.split().freeze();
    }
    let piece = Bytes::copy_from_slice(buffer);
    buffer.clear();
    piece
}

fn data(piece: Bytes) -> wire::TaskExecStdinWriteStreamRequest {
    let payload = wire::task_exec_stdin_write_stream_request::Payload::Data(piece);
    wire::TaskExecStdinWriteStreamRequest { payload: Some(payload) }
}

fn end() -> wire::TaskExecStdinWriteStreamRequest {
    let end = wire::TaskExecStdinWriteStreamEnd {};
    let payload = wire::task_exec_stdin_write_stream_request::Payload::End(end);
    wire::TaskExecStdinWriteStreamRequest { payload: Some(payload) }
}
