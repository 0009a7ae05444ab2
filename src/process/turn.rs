//! One turn of a worker: its calls are answered, its output kept, its limits held.

use std::collections::BTreeMap;
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;
use tokio::time::Sleep;

use super::CallCarrier;
use super::guest::{Asker, Guest};
use super::link::{Arrival, Death, Event, Stats};
use crate::agent::{Answer, Conversation, Done, Signal, Streams};
use crate::error::{Error, Result};
use crate::limits::{Limit, Limits, Usage};
use crate::protocol::{CALL_BYTES_MAX, Call, Message};

/// After a soft stop the grace is compute, which the supervisor counts. A worker that waits instead
/// is ended when it has taken this many times as long, and the second beside it.
const GRACE_FACTOR: u32 = 4;
const GRACE_EXTRA: Duration = Duration::from_secs(1);
/// How long a supervisor may take to end its worker, before it's ended itself.
const KILL_TIME: Duration = Duration::from_secs(10);
/// How long it may take to hear that a turn is over.
const END_TIME: Duration = Duration::from_secs(10);

/// How a turn ended.
pub(super) enum TurnEnd {
    /// The agent replied to everything.
    Returned,
    /// The worker is gone; the supervisor isn't.
    Dead(Death),
    /// Nothing is left, or nothing that can be trusted.
    Gone(Error),
}

/// Nothing has come of a call that waited for too long.
type Pending = FuturesUnordered<Pin<Box<dyn Future<Output = (Asker, Option<Done>)> + Send>>>;

type Outside = Pin<Box<dyn Future<Output = Done> + Send>>;

/// What a turn has come to.
struct Turn<'a> {
    guest: &'a mut Guest,
    conversation: &'a mut Conversation,
    streams: &'a mut Streams,
    grace: Duration,
    calls: Pending,
    /// The calls that wait, and the bytes of each.
    waiting: BTreeMap<Asker, usize>,
    waiting_bytes: usize,
    /// How long calls may wait for an answer, once the worker was asked to stop.
    patience: Option<Instant>,
    phase: Phase,
    deadline: Instant,
    waiting_since: Option<Instant>,
    host_wait: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// It was asked to stop.
    Stopping,
    /// Its supervisor was told to end it.
    Ending,
}

impl Guest {
    /// Runs a turn that the conversation has begun.
    ///
    /// If the future is dropped, the worker goes on with it: the guest has to be ended.
    pub(super) async fn turn(
        &mut self,
        conversation: &mut Conversation,
        streams: &mut Streams,
        limits: &Limits,
        signal: &Signal,
    ) -> (TurnEnd, Usage) {
        let since = Instant::now();
        self.link.stats = Stats::default();
        self.turns += 1;
        self.link.order(&json!({
            "op": "begin",
            "turn": self.turns,
            "compute": limits.compute.as_secs_f64(),
            "grace": limits.grace.as_secs_f64(),
        }));
        if let Some(number) = self.idle.take()
            && let Err(error) = self.link.answer(number, conversation.next_request())
        {
            return (TurnEnd::Gone(error), Usage::default());
        }
        let mut turn = Turn {
            guest: self,
            conversation,
            streams,
            grace: limits.grace,
            calls: Pending::new(),
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            patience: None,
            phase: Phase::Running,
            deadline: since + limits.wall,
            waiting_since: None,
            host_wait: Duration::ZERO,
        };
        let end = match turn.run(signal).await {
            Ok(end) => end,
            // The stream has ended; the machine may know more.
            Err(Error::Io { .. }) => TurnEnd::Gone(turn.guest.life.autopsy().await),
            Err(error) => TurnEnd::Gone(error),
        };
        turn.note_waiting(false);
        let host_wait = turn.host_wait;
        let mut stats = self.link.stats;
        if let TurnEnd::Dead(death) = &end {
            self.has_worker = false;
            self.link.forget_worker();
            stats.compute_us = stats.compute_us.max(death.compute_us);
            stats.resident_kib = stats.resident_kib.max(death.resident_kib);
        }
        let usage = Usage {
            compute: Duration::from_micros(stats.compute_us),
            wall: since.elapsed(),
            host_wait,
            memory_bytes: u64::from(stats.resident_kib) << 10,
            ..Usage::default()
        };
        (end, usage)
    }
}

impl Turn<'_> {
    async fn run(&mut self, signal: &Signal) -> Result<TurnEnd> {
        let mut sleep = pin!(tokio::time::sleep_until(self.deadline.into()));
        loop {
            self.note_waiting(!self.calls.is_empty());
            let can_be_interrupted = self.phase == Phase::Running && self.conversation.is_told();
            let arrival = tokio::select! {
                biased;
                () = signal.wait(), if can_be_interrupted => {
                    self.stop(Limit::Interrupt, sleep.as_mut())?;
                    continue;
                }
                () = &mut sleep => {
                    if let Some(end) = self.expire(sleep.as_mut()).await? {
                        return Ok(end);
                    }
                    continue;
                }
                Some((asker, done)) = self.calls.next(), if !self.calls.is_empty() => {
                    self.reply(asker, done)?;
                    continue;
                }
                call = carried(&mut self.guest.carrier) => {
                    let (key, bytes) = call?;
                    self.take_carried(Asker::Carrier(key), &bytes)?;
                    continue;
                }
                arrival = self.guest.link.next() => arrival?,
            };
            if let Some(end) = self.take(arrival, sleep.as_mut()).await? {
                return Ok(end);
            }
        }
    }

    fn reply(&mut self, asker: Asker, done: Option<Done>) -> Result<()> {
        self.waiting_bytes -= self.waiting.remove(&asker).unwrap_or_default();
        let Some(done) = done else { return self.guest.answer(asker, stopped()) };
        let reply = self.conversation.finish(done);
        let answered = self.guest.answer(asker, reply.clone());
        self.conversation.take_back(reply);
        answered
    }

    /// A call that came by the other way. Cells can send there what they like, so that nothing but calls
    /// of language models is taken, and what is wrong with one is told to whoever sent it.
    fn take_carried(&mut self, asker: Asker, bytes: &Bytes) -> Result<()> {
        let answer = match Call::from_bytes(bytes) {
            Ok(call) if call.is_for_models() => self.conversation.answer(call),
            Ok(_) => Err(Error::protocol("only calls of language models come by this way")),
            Err(error) => Err(error),
        };
        match answer {
            Ok(Answer::Now(message)) => self.guest.answer(asker, message),
            Ok(Answer::Later(outside)) => self.hold(asker, bytes.len(), outside),
            Err(error) => {
                self.guest.answer(asker, Message::new(json!({ "error": error.to_string() })))
            }
        }
    }

    async fn take(&mut self, arrival: Arrival, sleep: Pin<&mut Sleep>) -> Result<Option<TurnEnd>> {
        match arrival {
            Arrival::Stdout(bytes) => self.streams.stdout.write(&bytes),
            Arrival::Stderr(bytes) => self.streams.stderr.write(&bytes),
            Arrival::Call { number, bytes } => {
                let (call, length) = (Call::from_bytes(&bytes)?, bytes.len());
                drop(bytes);
                match self.conversation.answer(call)? {
                    Answer::Now(message) => {
                        // Only what the host has no more requests after is answered with nothing.
                        if message == Message::default() {
                            // It's answered with what the next turn begins with.
                            self.guest.idle = Some(number);
                            // A worker that is being ended doesn't have another one.
                            if self.phase != Phase::Ending {
                                return self.end().await.map(Some);
                            }
                            return Ok(None);
                        }
                        self.guest.link.answer(number, message)?;
                    }
                    Answer::Later(outside) => {
                        self.hold(Asker::Link(number), length, outside)?;
                    }
                }
            }
            Arrival::Event(Event::Limit { turn, .. }) if turn != self.guest.turns => {}
            Arrival::Event(Event::Limit { hard: true, .. }) => {
                if self.phase != Phase::Ending {
                    self.kill(sleep);
                }
            }
            Arrival::Event(Event::Limit { hard: false, .. }) => {
                if self.phase == Phase::Running {
                    self.note_stop(Limit::Compute, sleep)?;
                }
            }
            Arrival::Event(Event::Starved) => self.streams.stderr.write(
                b"MemoryError: the memory limit has killed a process that the session started\n",
            ),
            Arrival::Event(Event::Dead(death)) => return Ok(Some(TurnEnd::Dead(death))),
            Arrival::Event(Event::Ready { .. } | Event::Unfit { .. } | Event::Exposed)
            | Arrival::Code(_) => {
                return Err(Error::protocol("the supervisor began anew in the middle of a turn"));
            }
        }
        Ok(None)
    }

    /// A call whose answer comes from outside. Threads can have many, and the host keeps what they sent.
    fn hold(&mut self, asker: Asker, length: usize, outside: Outside) -> Result<()> {
        if self.waiting_bytes + length > CALL_BYTES_MAX {
            let text = format!("calls that wait have more than {CALL_BYTES_MAX} bytes");
            let refusal = json!({ "error": text, "type": "RuntimeError" });
            return self.guest.answer(asker, Message::new(refusal));
        }
        let patience = self.patience;
        if patience.is_some_and(|until| Instant::now() >= until) {
            return self.guest.answer(asker, stopped());
        }
        // A guest that uses a number twice gets two answers.
        let before = self.waiting.insert(asker, length).unwrap_or_default();
        self.waiting_bytes = self.waiting_bytes + length - before;
        self.calls.push(Box::pin(async move {
            let done = match patience {
                None => Some(outside.await),
                Some(until) => tokio::time::timeout_at(until.into(), outside).await.ok(),
            };
            (asker, done)
        }));
        Ok(())
    }

    /// The agent has replied to everything. Threads that still wait for an answer get one.
    async fn end(&mut self) -> Result<TurnEnd> {
        self.refuse_pending()?;
        self.guest.link.order(&json!({ "op": "end" }));
        match tokio::time::timeout(END_TIME, self.guest.link.flush()).await {
            Ok(Ok(())) => Ok(TurnEnd::Returned),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::protocol("its supervisor does not read what it is told")),
        }
    }

    /// The time is over.
    async fn expire(&mut self, sleep: Pin<&mut Sleep>) -> Result<Option<TurnEnd>> {
        match self.phase {
            Phase::Running if self.conversation.is_told() => self.stop(Limit::Wall, sleep)?,
            Phase::Running | Phase::Stopping => {
                if self.phase == Phase::Running {
                    self.conversation.stop(Limit::Wall);
                }
                self.kill(sleep);
            }
            Phase::Ending => {
                return Ok(Some(TurnEnd::Gone(Error::Poisoned {
                    reason: "the cell could not be stopped, so that its process was ended".into(),
                })));
            }
        }
        Ok(None)
    }

    fn kill(&mut self, sleep: Pin<&mut Sleep>) {
        self.guest.link.order(&json!({ "op": "kill" }));
        self.enter(Phase::Ending, KILL_TIME, sleep);
    }

    /// Asks the worker to stop. The order goes first, so that the cell is stopped before it can look
    /// at the answers.
    fn stop(&mut self, limit: Limit, sleep: Pin<&mut Sleep>) -> Result<()> {
        self.guest.link.order(&json!({ "op": "interrupt" }));
        self.note_stop(limit, sleep)
    }

    fn note_stop(&mut self, limit: Limit, sleep: Pin<&mut Sleep>) -> Result<()> {
        self.conversation.stop(limit);
        self.refuse_pending()?;
        self.patience = Some(Instant::now() + self.grace);
        self.enter(Phase::Stopping, self.grace * GRACE_FACTOR + GRACE_EXTRA, sleep);
        Ok(())
    }

    fn enter(&mut self, phase: Phase, time: Duration, mut sleep: Pin<&mut Sleep>) {
        self.phase = phase;
        self.deadline = Instant::now() + time;
        sleep.as_mut().reset(self.deadline.into());
    }

    fn refuse_pending(&mut self) -> Result<()> {
        self.calls.clear();
        self.waiting_bytes = 0;
        for asker in std::mem::take(&mut self.waiting).into_keys() {
            self.guest.answer(asker, stopped())?;
        }
        Ok(())
    }

    fn note_waiting(&mut self, waits: bool) {
        match (waits, self.waiting_since) {
            (true, None) => self.waiting_since = Some(Instant::now()),
            (false, Some(since)) => {
                self.host_wait += since.elapsed();
                self.waiting_since = None;
            }
            _ => {}
        }
    }
}

/// What comes by the other way, if there is one.
async fn carried(carrier: &mut Option<Box<dyn CallCarrier>>) -> Result<(u64, Bytes)> {
    match carrier {
        Some(carrier) => carrier.next().await,
        None => std::future::pending().await,
    }
}

/// The answer to a call of a cell that has to stop.
fn stopped() -> Message {
    Message::new(json!({ "error": "stopped" }))
}
