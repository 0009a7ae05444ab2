//! The two byte streams of a process: frames of the supervisor, and in them those of the worker.
//!
//! The format is in `guest/supervisor.py` and `guest/worker.py`. Reading and writing happen in one
//! future, [`Link::turn`], which may be dropped at any time: no frame is lost or torn by that.
//! Everything that arrives is hostile.

use std::collections::VecDeque;
use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Error, Result};
use crate::protocol::{CALL_BYTES_MAX, Message};

/// Kind and length.
const HEAD_BYTES: usize = 5;
/// Largest frame of the supervisor but for its compiled code.
const FRAME_BYTES_MAX: usize = 1 << 20;
/// Compiled code of the agent takes about 150 kB.
const CODE_BYTES_MAX: usize = 4 << 20;
/// Bytes of the worker are sent in frames of this size, so that an order can come between them.
const CHUNK_BYTES: usize = 256 << 10;
/// What comes before the worker's bytes in a frame: its compute and its size.
const STATS_BYTES: usize = 12;
/// Length, number and token of a worker's call.
const CALL_HEAD_BYTES: usize = 8 + TOKEN_BYTES;
/// Length and number of an answer to one.
const ANSWER_HEAD_BYTES: usize = 8;
const TOKEN_BYTES: usize = 8;
/// Answers that may wait to be read by the guest. Each belongs to a thread that waits for it.
const ANSWERS_WAITING_MAX: usize = 10_000;
/// Room that is made for each read.
const READ_BYTES: usize = 64 << 10;

/// What the worker spent in this turn so far, as its supervisor measured it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Stats {
    pub(super) compute_us: u64,
    pub(super) resident_kib: u32,
}

/// What a supervisor says about its worker.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event {
    /// There is a worker.
    Ready {
        #[serde(default)]
        python: String,
        #[serde(default)]
        dill: bool,
        /// Its number, from 1.
        #[serde(default)]
        worker: u64,
    },
    /// This Python is too old.
    Unfit { python: String },
    /// The worker computed for as long as it may. It was asked to stop; or it was before, didn't, and
    /// has to be ended (`hard`).
    Limit { turn: u64, hard: bool },
    /// Cells could get at the supervisor.
    Exposed,
    /// The memory limit has killed a process of the session.
    Starved,
    /// The worker is gone, with all that it started.
    Dead(Death),
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Death {
    /// Whether it was the supervisor that ended it.
    pub(super) killed: bool,
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    /// Whether the memory limit has killed a process meanwhile.
    pub(super) starved: bool,
    #[serde(default)]
    pub(super) compute_us: u64,
    #[serde(default)]
    pub(super) resident_kib: u32,
}

/// What arrives.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// A call of the worker, with its number.
    Call {
        number: u32,
        bytes: Bytes,
    },
    Stdout(Bytes),
    Stderr(Bytes),
    Event(Event),
    /// Compiled code of the agent, after the sixteen bytes that say of which Python.
    Code(Bytes),
}

/// Both streams, and what is between them and whole messages.
pub(super) struct Link {
    reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
    /// What every call of the worker has: bytes that a cell writes to a descriptor it guessed don't.
    token: [u8; TOKEN_BYTES],
    inbox: BytesMut,
    /// The worker's bytes that are not yet a whole call.
    partial: BytesMut,
    outbox: VecDeque<Bytes>,
    /// Frames that are to be written together, after the outbox.
    tail: BytesMut,
    /// Answers in the outbox.
    answers: usize,
    needs_flush: bool,
    /// Whether nobody reads any more. What was said before that is still to be heard.
    is_deaf: bool,
    pub(super) stats: Stats,
}

impl Link {
    pub(super) fn new(
        reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
        writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
        token: [u8; TOKEN_BYTES],
    ) -> Self {
        Self {
            token,
            reader,
            writer,
            inbox: BytesMut::new(),
            partial: BytesMut::new(),
            outbox: VecDeque::new(),
            tail: BytesMut::new(),
            answers: 0,
            needs_flush: false,
            is_deaf: false,
            stats: Stats::default(),
        }
    }

    /// Puts bytes into the outbox that are no frame: what the loader reads.
    pub(super) fn put_raw(&mut self, bytes: Bytes) {
        if !self.tail.is_empty() {
            self.outbox.push_back(self.tail.split().freeze());
        }
        self.outbox.push_back(bytes);
    }

    /// Puts a frame into the outbox.
    pub(super) fn put(&mut self, kind: u8, payload: &[u8]) {
        self.tail.put_u8(kind);
        self.tail.put_u32(payload.len() as u32);
        self.tail.put_slice(payload);
    }

    /// Puts an order for the supervisor into the outbox.
    pub(super) fn order(&mut self, order: &serde_json::Value) {
        self.put(b'C', order.to_string().as_bytes());
    }

    /// Puts the answer to the worker's call `number` into the outbox.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the guest asks and doesn't read the answers, [`Error::Invalid`] for
    /// a message that is too long for a frame.
    pub(super) fn answer(&mut self, number: u32, message: Message) -> Result<()> {
        if self.answers >= ANSWERS_WAITING_MAX {
            return Err(Error::protocol("it asks and does not read the answers"));
        }
        let head = message.head();
        let length = head.len() + message.body.len();
        let Ok(length) = u32::try_from(length) else {
            return Err(Error::invalid("message", format!("{length} bytes are too many")));
        };
        let mut first = BytesMut::with_capacity(ANSWER_HEAD_BYTES + head.len());
        first.put_u32(length);
        first.put_u32(number);
        first.put_slice(&head);
        let mut body = Bytes::from(message.body);
        if first.len() + body.len() <= CHUNK_BYTES {
            first.put_slice(&body);
            body.clear();
        }
        self.put(b'D', &first);
        while !body.is_empty() {
            let chunk = body.split_to(body.len().min(CHUNK_BYTES));
            self.tail.put_u8(b'D');
            self.tail.put_u32(chunk.len() as u32);
            self.put_raw(chunk);
        }
        self.answers += 1;
        Ok(())
    }

    /// Moves bytes in both directions until something has arrived. May be dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] for what no supervisor and no agent says; [`Error::Io`] when a stream has
    /// ended or failed.
    pub(super) async fn next(&mut self) -> Result<Arrival> {
        loop {
            if let Some(arrival) = self.take()? {
                return Ok(arrival);
            }
            self.move_bytes().await.map_err(|e| Error::io("the channel to the guest", e))?;
        }
    }

    /// Writes what is in the outbox. May be dropped.
    ///
    /// # Errors
    ///
    /// As [`next`](Self::next).
    pub(super) async fn flush(&mut self) -> Result<()> {
        while !self.outbox.is_empty() || !self.tail.is_empty() || self.needs_flush {
            self.move_bytes().await.map_err(|e| Error::io("the channel to the guest", e))?;
        }
        Ok(())
    }

    async fn move_bytes(&mut self) -> io::Result<()> {
        if self.is_deaf {
            self.outbox.clear();
            self.tail.clear();
            self.needs_flush = false;
        }
        while self.outbox.front().is_some_and(Bytes::is_empty) {
            self.outbox.pop_front();
        }
        if self.outbox.is_empty() && !self.tail.is_empty() {
            self.outbox.push_back(self.tail.split().freeze());
        }
        if self.outbox.is_empty() && self.needs_flush {
            self.is_deaf |= self.writer.flush().await.is_err();
            self.needs_flush = false;
            self.answers = 0;
            return Ok(());
        }
        self.inbox.reserve(READ_BYTES);
        let Some(front) = self.outbox.front_mut() else {
            return ended(self.reader.read_buf(&mut self.inbox).await?);
        };
        tokio::select! {
            biased;
            written = self.writer.write(front) => {
                match written {
                    Ok(0) | Err(_) => self.is_deaf = true,
                    Ok(written) => {
                        front.advance(written);
                        self.needs_flush = true;
                    }
                }
                Ok(())
            }
            read = self.reader.read_buf(&mut self.inbox) => ended(read?),
        }
    }

    /// What has arrived as a whole.
    fn take(&mut self) -> Result<Option<Arrival>> {
        loop {
            if let Some(call) = self.take_call()? {
                return Ok(Some(call));
            }
            let Some((kind, mut payload)) = self.take_frame()? else { return Ok(None) };
            return Ok(Some(match kind {
                b'D' => {
                    if payload.len() < STATS_BYTES {
                        return Err(Error::protocol("bytes of the worker without its figures"));
                    }
                    let (compute_us, resident_kib) = (payload.get_u64(), payload.get_u32());
                    self.stats = Stats { compute_us, resident_kib };
                    self.partial.extend_from_slice(&payload);
                    continue;
                }
                b'O' => Arrival::Stdout(payload),
                b'E' => Arrival::Stderr(payload),
                b'M' => Arrival::Code(payload),
                b'C' => Arrival::Event(serde_json::from_slice(&payload).map_err(|e| {
                    Error::protocol(format!("an event that no supervisor sends: {e}"))
                })?),
                other => return Err(Error::protocol(format!("a frame of the kind {other}"))),
            }));
        }
    }

    fn take_frame(&mut self) -> Result<Option<(u8, Bytes)>> {
        let Some((head, _)) = self.inbox.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *head;
        let length = u32::from_be_bytes(length) as usize;
        let most = if kind == b'M' { CODE_BYTES_MAX } else { FRAME_BYTES_MAX };
        if length > most {
            return Err(Error::protocol(format!("a frame of {length} bytes")));
        }
        if self.inbox.len() < HEAD_BYTES + length {
            return Ok(None);
        }
        self.inbox.advance(HEAD_BYTES);
        Ok(Some((kind, self.inbox.split_to(length).freeze())))
    }

    fn take_call(&mut self) -> Result<Option<Arrival>> {
        let Some((head, _)) = self.partial.split_first_chunk::<CALL_HEAD_BYTES>() else {
            return Ok(None);
        };
        let (length, number) =
            ([head[0], head[1], head[2], head[3]], [head[4], head[5], head[6], head[7]]);
        if head[8..] != self.token {
            return Err(Error::protocol("bytes on the channel that the agent didn't send"));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > CALL_BYTES_MAX {
            return Err(Error::protocol(format!("a call of {length} bytes")));
        }
        if self.partial.len() < CALL_HEAD_BYTES + length {
            return Ok(None);
        }
        self.partial.advance(CALL_HEAD_BYTES);
        let bytes = self.partial.split_to(length).freeze();
        if self.partial.is_empty() && length > FRAME_BYTES_MAX {
            // The rest of the room for a long call would keep all of it.
            self.partial = BytesMut::new();
        }
        Ok(Some(Arrival::Call { number: u32::from_be_bytes(number), bytes }))
    }

    /// Forgets what a worker that is gone has said.
    pub(super) fn forget_worker(&mut self) {
        self.partial.clear();
        self.stats = Stats::default();
    }
}

fn ended(read: usize) -> io::Result<()> {
    if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}
