//! A live process: its supervisor, the worker that it may have, and the streams between.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::json;

use super::link::{Arrival, Death, Event, Link};
use super::{CallCarrier, Door, Life, Machine, Started};
use crate::agent::{LOADER, SUPERVISOR, process_sources};
use crate::environment::EnvironmentOptions;
use crate::error::{Error, Result};
use crate::protocol::{CALL_BYTES_MAX, Message};

/// How long a process may take from its start to its first words. A loaded machine, or an image that
/// has to be read from a slow disk, takes seconds.
const START_TIME: Duration = Duration::from_secs(60);
/// How long a worker may take to end when it's told to.
const END_TIME: Duration = Duration::from_secs(10);
/// Bytes that say of which Python compiled code is.
const MAGIC_BYTES: usize = 4;

/// The agent as one Python compiled it: a session whose Python is the same need not do it again. It
/// comes from a process in which no cell has run.
#[derive(Debug, Default)]
pub(super) struct Compiled(OnceLock<Code>);

#[derive(Debug)]
struct Code {
    magic: Bytes,
    supervisor: Bytes,
    modules: Bytes,
}

impl Compiled {
    /// Keeps what a supervisor has compiled: `magic | length: u32 | supervisor | modules`.
    fn keep(&self, payload: &Bytes) {
        let Some((magic, rest)) = payload.split_at_checked(MAGIC_BYTES) else { return };
        let Some((length, rest)) = rest.split_first_chunk::<4>() else { return };
        let length = u32::from_be_bytes(*length) as usize;
        if let Some((supervisor, modules)) = rest.split_at_checked(length) {
            let code = Code {
                magic: payload.slice_ref(magic),
                supervisor: payload.slice_ref(supervisor),
                modules: payload.slice_ref(modules),
            };
            // Two sessions may have been first at once, with the same code.
            let _ = self.0.set(code);
        }
    }
}

/// Where a call came from, and its answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Asker {
    /// Over the streams, by the worker's number of it.
    Link(u32),
    /// By the other way.
    Carrier(u64),
}

/// A live process.
pub(super) struct Guest {
    pub(super) link: Link,
    /// The other way of calls of language models, if they have one.
    pub(super) carrier: Option<Box<dyn CallCarrier>>,
    pub(super) life: Box<dyn Life>,
    /// Whether there is a worker.
    pub(super) has_worker: bool,
    /// The call by which the agent asks for something to do, if it has asked.
    pub(super) idle: Option<u32>,
    /// Whether its Python can save variables.
    pub(super) dill: bool,
    /// How many turns it has had: what is said of one isn't to be taken for the next.
    pub(super) turns: u64,
}

impl Guest {
    /// Starts a process, up to the moment in which its worker asks for something to do.
    ///
    /// # Errors
    ///
    /// As [`Machine::start`]; [`Error::Incompatible`] for a Python that is too old, and what the
    /// machine knows about a process that ended.
    pub(super) async fn start(
        machine: &dyn Machine,
        compiled: &Compiled,
        options: &EnvironmentOptions,
    ) -> Result<Self> {
        let Started { reader, writer, life, surroundings, calls } =
            machine.start(&["-c", LOADER], options).await?;
        let token = rand::random::<u64>().to_be_bytes();
        let mut guest = Self {
            link: Link::new(reader, writer, token),
            carrier: calls,
            life,
            has_worker: false,
            idle: None,
            dill: false,
            turns: 0,
        };
        let code = compiled.0.get();
        let settings = json!({
            "scratch": surroundings.scratch,
            "is_alone": surroundings.is_alone,
            "data_bytes": surroundings.data_bytes,
            "file_bytes": surroundings.file_bytes,
            "user": surroundings.user,
            "call_bytes_max": CALL_BYTES_MAX,
            "token": format!("{:016x}", u64::from_be_bytes(token)),
            "door": surroundings.door.map(|Door { port, token, bytes_max }| {
                json!({ "port": port, "token": token.expose(), "bytes_max": bytes_max })
            }),
        });
        for part in boot(settings, code) {
            guest.link.put_raw(part);
        }
        if let Err(error) = guest.ready(compiled).await {
            // Why it didn't begin is what has to be known.
            let _ = guest.close().await;
            return Err(error);
        }
        Ok(guest)
    }

    /// Starts another worker under the same supervisor.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub(super) async fn start_worker(&mut self, compiled: &Compiled) -> Result<()> {
        self.link.forget_worker();
        self.link.order(&json!({ "op": "start" }));
        self.ready(compiled).await
    }

    /// Answers a call.
    ///
    /// # Errors
    ///
    /// As [`Link::answer`].
    pub(super) fn answer(&mut self, asker: Asker, message: Message) -> Result<()> {
        match (asker, &mut self.carrier) {
            (Asker::Link(number), _) => self.link.answer(number, message)?,
            (Asker::Carrier(key), Some(carrier)) => carrier.answer(key, message),
            (Asker::Carrier(_), None) => {}
        }
        Ok(())
    }

    /// Ends the worker. The supervisor stays, and so does what the machine has started.
    ///
    /// # Errors
    ///
    /// When nothing tells that it's gone; the process is of no use then.
    pub(super) async fn end_worker(&mut self) -> Result<()> {
        self.link.order(&json!({ "op": "kill" }));
        let dead = async {
            while !matches!(self.link.next().await?, Arrival::Event(Event::Dead(_))) {}
            Ok::<_, Error>(())
        };
        let dead = tokio::time::timeout(END_TIME, dead).await;
        self.has_worker = false;
        dead.unwrap_or_else(|_| Err(Error::protocol("its worker could not be ended")))
    }

    /// Ends it all, without waiting. The end of its stdin says so to the supervisor. Closing what is
    /// returned waits.
    pub(super) fn kill(self) -> Box<dyn Life> {
        let Self { link, mut life, .. } = self;
        drop(link);
        life.kill();
        life
    }

    /// Ends it all, and waits for that.
    ///
    /// # Errors
    ///
    /// As [`Life::close`].
    pub(super) async fn close(self) -> Result<()> {
        let Self { link, mut life, .. } = self;
        drop(link);
        life.close().await
    }

    async fn ready(&mut self, compiled: &Compiled) -> Result<()> {
        let ready = async {
            loop {
                match self.link.next().await? {
                    Arrival::Event(Event::Ready { dill, worker, .. }) => {
                        self.dill |= dill;
                        if let Some(carrier) = &mut self.carrier {
                            carrier.begin_worker(worker);
                        }
                        return Ok(());
                    }
                    Arrival::Event(Event::Unfit { python }) => {
                        return Err(Error::Incompatible {
                            what: "the Python of the session".into(),
                            expected: "CPython 3.9 or newer".into(),
                            found: python.chars().take(40).collect(),
                        });
                    }
                    Arrival::Code(payload) => compiled.keep(&payload),
                    Arrival::Event(Event::Dead(death)) => return Err(unstarted(death)),
                    Arrival::Event(Event::Exposed) => {
                        return Err(Error::Incompatible {
                            what: "the Python of the session".into(),
                            expected: "one with ctypes, which keeps cells off its channel".into(),
                            found: "one without".into(),
                        });
                    }
                    Arrival::Event(Event::Starved | Event::Limit { .. }) => {}
                    // Of a worker before this one.
                    Arrival::Stdout(_) | Arrival::Stderr(_) => {}
                    Arrival::Call { .. } => {
                        return Err(Error::protocol("a call of a worker that isn't there"));
                    }
                }
            }
        };
        match tokio::time::timeout(START_TIME, ready).await {
            Ok(Ok(())) => {
                (self.has_worker, self.idle) = (true, None);
                Ok(())
            }
            Ok(Err(Error::Io { .. })) => Err(self.life.autopsy().await),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::unavailable(
                "the session's process",
                format!("it did not begin within {START_TIME:?}; is the machine overloaded?"),
            )),
        }
    }
}

fn unstarted(death: Death) -> Error {
    let reason = match (death.starved, death.signal) {
        (true, _) => "its memory is too small for Python; raise limits.memory_bytes".into(),
        (_, Some(signal)) => format!("it was killed by signal {signal} before the first cell"),
        _ => format!("it exited with {} before the first cell", death.code.unwrap_or(0)),
    };
    Error::unavailable("the session's process", reason)
}

/// What the loader reads, and the first frame of the supervisor.
fn boot(mut settings: serde_json::Value, code: Option<&Code>) -> Vec<Bytes> {
    let sources = process_sources();
    let mut bodies = vec![("supervisor", SUPERVISOR.as_bytes())];
    bodies.extend(sources.iter().map(|(name, source)| (*name, source.as_bytes())));
    if let Some(code) = code {
        let magic: String = code.magic.iter().map(|byte| format!("{byte:02x}")).collect();
        settings["magic"] = magic.into();
        bodies.push(("code", &code.modules));
    }
    settings["modules"] = sources.iter().map(|(name, _)| *name).collect::<Vec<_>>().into();
    settings["bodies"] =
        bodies.iter().map(|(name, body)| json!([name, body.len()])).collect::<Vec<_>>().into();
    let settings = settings.to_string();
    let length = 4 + settings.len() + bodies.iter().map(|(_, body)| body.len()).sum::<usize>();
    let mut bytes = BytesMut::with_capacity(length + SUPERVISOR.len() + 64);
    let loaded = match code {
        Some(code) => [&code.magic[..], &code.supervisor],
        None => [&[][..], &[]],
    };
    for part in loaded.into_iter().chain([SUPERVISOR.as_bytes()]) {
        bytes.put_u32(part.len() as u32);
        bytes.put_slice(part);
    }
    bytes.put_u8(b'B');
    bytes.put_u32(length as u32);
    bytes.put_u32(settings.len() as u32);
    bytes.put_slice(settings.as_bytes());
    for (_, body) in bodies {
        bytes.put_slice(body);
    }
    vec![bytes.freeze()]
}
