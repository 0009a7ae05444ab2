//! `WasmEnvironment`: the contract on a Wasm guest.

mod ending;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::Value as Json;

use super::Image;
use super::asleep::Asleep;
use super::files::Scratch;
use super::opening::{self, Origin, Shared, Ties, resumed};
use super::parking::Parking;
use super::saved::{BACKEND, Saved};
use super::session::{Session, Turn, TurnEnd};
use crate::agent::{Conversation, Request, Signal, Streams, check_tool, not_begun};
use crate::environment::{
    Capabilities, Context, Environment, EnvironmentOptions, ExecuteOptions, Execution, Interrupt,
    Status, Tool, Variable,
};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::lm::{Ledger, UsageSummary};
use crate::protocol::Message;
use crate::snapshot::Snapshot;
use crate::tenant::{Seat, Turn as Permit};
use crate::value::Value;

/// What is kept of the output of a turn that isn't a cell: nobody sees it.
const QUIET_OUTPUT_BYTES: u64 = 0;
/// Limits of turns that aren't cells, such as setting a variable: the guest's own code in `repr` and
/// `__len__` may run in them.
const SERVICE_TIME: Duration = Duration::from_secs(30);

/// One Python session in a Wasm sandbox. Made by [`Runtime::environment`](crate::Runtime::environment).
///
/// Needs a tokio runtime with time enabled. A guest that computes gives its thread up about every
/// millisecond; one that waits for an LM, a tool or a sleep holds none.
pub struct WasmEnvironment {
    phase: Phase,
    ties: Ties,
    shared: Arc<Shared>,
    options: EnvironmentOptions,
    /// Tools that were registered since the last turn: the session may be away, being saved.
    new_tools: Vec<Tool>,
    image: Image,
}

enum Phase {
    Ready(Box<Session>),
    /// A checkpoint is to be taken in the background, or is being taken.
    Saving(Arc<Parking>),
    /// Hibernated.
    Asleep(Arc<Asleep>),
    Lost(String),
}

impl std::fmt::Debug for WasmEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WasmEnvironment").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl WasmEnvironment {
    pub(crate) const CAPABILITIES: Capabilities = Capabilities {
        backend: BACKEND,
        isolated: true,
        fuel: true,
        rollback: true,
        snapshot: true,
        deterministic: true,
    };

    pub(crate) fn open(
        shared: &Arc<Shared>,
        image: &Image,
        options: EnvironmentOptions,
    ) -> Result<Self> {
        Self::begin(shared, image, options, image.origin())
    }

    /// A session that goes on from a saved one.
    pub(crate) fn resume(
        shared: &Arc<Shared>,
        saved: &Saved,
        options: EnvironmentOptions,
    ) -> Result<Self> {
        let options = resumed(options, &saved.record)?;
        Self::begin(shared, &saved.image, options, Origin::Saved(saved))
    }

    fn begin(
        shared: &Arc<Shared>,
        image: &Image,
        options: EnvironmentOptions,
        origin: Origin<'_>,
    ) -> Result<Self> {
        options.limits.validate()?;
        options.policy.validate()?;
        if options.limits.memory_bytes < image.manifest().memory_bytes {
            return Err(Error::invalid(
                "limits.memory_bytes",
                format!("the image alone has {} bytes", image.manifest().memory_bytes),
            ));
        }
        let tenant = options.tenant.clone().unwrap_or_else(|| shared.tenants.default_tenant());
        let seat = match options.depth {
            0 => tenant.open_session()?,
            _ => tenant.open_nested_session()?,
        };
        let ties = Ties { seat: Arc::new(seat), signal: Arc::default(), ledger: Ledger::default() };
        let session = opening::open(shared, image, &options, origin, &ties)?;
        Ok(Self {
            phase: Phase::Ready(Box::new(session)),
            ties,
            shared: Arc::clone(shared),
            options,
            new_tools: Vec::new(),
            image: image.clone(),
        })
    }

    pub(super) fn signal(&self) -> Arc<Signal> {
        Arc::clone(&self.ties.signal)
    }

    pub(crate) fn ledger(&self) -> Ledger {
        self.ties.ledger.clone()
    }

    fn turn(&self) -> Turn {
        Turn::Entry(self.image.manifest().entry)
    }

    /// The session, awake, when no checkpoint is being taken and nothing of a dropped turn is left.
    async fn session(&mut self) -> Result<&mut Session> {
        self.saved().await;
        self.wake().await?;
        if let Phase::Ready(session) = &mut self.phase
            && session.guest().running
        {
            // The future of the last turn was dropped in the middle.
            self.roll_back()?;
        }
        match &mut self.phase {
            Phase::Ready(session) => {
                for tool in self.new_tools.drain(..) {
                    session.guest_mut().conversation.add_tool(tool)?;
                }
                Ok(session)
            }
            Phase::Lost(reason) => Err(Error::Poisoned { reason: reason.clone() }),
            Phase::Saving(_) | Phase::Asleep(_) => {
                Err(Error::Internal("a session is not where it should be".into()))
            }
        }
    }

    /// Leave to compute, when the session is there.
    async fn permit(&mut self) -> Result<Permit> {
        // First what may take long without a guest that computes.
        self.session().await?;
        self.ties.seat.admit().await
    }

    /// The session, with leave to compute.
    async fn admitted(&mut self, permit: Permit) -> Result<&mut Session> {
        let ledger = self.ties.ledger.clone();
        let session = self.session().await?;
        let guest = session.guest_mut();
        guest.conversation.set_books(Some(permit.lm()), ledger);
        guest.leave.set(Some(permit));
        Ok(session)
    }

    /// Waits for the checkpoint that is being taken, or takes the one that nobody has begun with.
    async fn saved(&mut self) {
        if let Phase::Saving(parking) = &self.phase {
            self.phase = match parking.finish().await {
                Ok(session) => Phase::Ready(session),
                Err(e) => Phase::Lost(format!("taking a checkpoint failed: {e}")),
            };
        }
    }

    fn roll_back(&mut self) -> Result<()> {
        let Phase::Ready(session) = &mut self.phase else { return Ok(()) };
        session.guest_mut().conversation.abandon();
        let result = session.roll_back();
        if let Err(error) = &result {
            self.phase = Phase::Lost(format!("rolling back failed: {error}"));
        }
        result
    }

    /// Takes the checkpoint of the state that the last turn left, while nobody waits for it.
    fn save_in_background(&mut self) {
        let phase = std::mem::replace(&mut self.phase, Phase::Lost("a checkpoint was lost".into()));
        let Phase::Ready(mut session) = phase else {
            self.phase = phase;
            return;
        };
        session.guest_mut().conversation.keep();
        self.phase = Phase::Saving(Parking::new(session));
    }

    /// Gives up the session's memory: it becomes a file, and the next use brings it back. What it
    /// shares with a template stays in memory as long as it's shared. Returns the file's size in
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the files that the guest has open, [`Error::Io`] when there is no
    /// room for the file. The session is as it was then.
    pub async fn hibernate(&mut self) -> Result<u64> {
        self.saved().await;
        if let Phase::Asleep(asleep) = &self.phase {
            return Ok(asleep.bytes());
        }
        let (shared, image) = (Arc::clone(&self.shared), self.image.base());
        let session = self.session().await?;
        // Before the capture, which has every run too.
        let runs = session.checkpoint().runs().iter();
        let runs = runs.filter(|run| !session.is_own(run)).cloned().collect();
        let saved = Saved::capture(&image, session)?;
        let write = move || Asleep::new(&shared, &saved, runs);
        let asleep = tokio::task::spawn_blocking(write).await;
        let asleep = asleep.map_err(|e| Error::Internal(format!("hibernating: {e}")))??;
        let bytes = asleep.bytes();
        release(std::mem::replace(&mut self.phase, Phase::Asleep(Arc::new(asleep))));
        self.ties.seat.set_memory(0);
        Ok(bytes)
    }

    /// A second session in the same state, with the same options: [`Environment::fork`] with the
    /// type of this backend.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn fork_session(&mut self) -> Result<Self> {
        let image = self.image.base();
        let session = self.session().await?;
        let saved = Saved::capture(&image, session)?;
        Self::resume(&self.shared, &saved, self.options.clone())
    }

    /// Removes the session's files, and reports what resists.
    pub(crate) async fn close_files(&mut self) -> Result<()> {
        self.saved().await;
        match &mut self.phase {
            // A directory that was never used is worth keeping.
            Phase::Ready(session) if !session.guest().files.is_unused() => {
                session.guest_mut().scratch.take().map_or(Ok(()), Scratch::close)
            }
            _ => Ok(()),
        }
    }

    /// Whether the session is hibernated.
    #[must_use]
    pub fn is_hibernated(&self) -> bool {
        matches!(self.phase, Phase::Asleep(_))
    }

    /// Bytes of memory that only this session takes, as of its last checkpoint: the pages that it
    /// wrote, and their copies for the rollback.
    #[must_use]
    pub fn private_bytes(&self) -> u64 {
        self.ties.seat.memory_bytes()
    }

    /// The session's part of its tenant.
    pub(crate) fn seat(&self) -> &Arc<Seat> {
        &self.ties.seat
    }

    async fn wake(&mut self) -> Result<()> {
        let Phase::Asleep(asleep) = &self.phase else { return Ok(()) };
        // A future that is dropped meanwhile leaves the session asleep.
        let asleep = Arc::clone(asleep);
        let (shared, image) = (Arc::clone(&self.shared), self.image.base());
        let (options, ties) = (self.options.clone(), self.ties.clone());
        let wake = move || {
            let saved = asleep.read(&image)?;
            opening::open(&shared, &image, &options, Origin::Saved(&saved), &ties)
        };
        let session = tokio::task::spawn_blocking(wake).await;
        let session = session.map_err(|e| Error::Internal(format!("waking a session: {e}")))??;
        self.new_tools.clear();
        self.phase = Phase::Ready(Box::new(session));
        Ok(())
    }

    /// Runs one cell, unless it was interrupted since somebody took the signal.
    ///
    /// # Errors
    ///
    /// As [`Environment::execute_opts`].
    pub(super) async fn run_cell(
        &mut self,
        code: &str,
        options: ExecuteOptions,
    ) -> Result<Execution> {
        let limits = options.limits.unwrap_or_else(|| self.options.limits.clone());
        limits.validate()?;
        let (since, turn, signal) = (Instant::now(), self.turn(), Arc::clone(&self.ties.signal));
        let permit = tokio::select! {
            biased;
            () = signal.wait() => return Ok(not_begun(&limits, Some(0), since.elapsed())),
            permit = self.permit() => permit?,
        };
        let session = self.admitted(permit).await?;
        let guest = session.guest_mut();
        guest.streams = Streams::new(limits.output_bytes);
        let request = guest.conversation.cell(code);
        guest.conversation.begin(Some(request), &limits);
        let (end, usage) = session.turn(turn, &limits).await;
        if !matches!(end, TurnEnd::Returned) {
            return self.stopped(end, usage);
        }
        let guest = session.guest_mut();
        let refused = guest.refused_bytes.take().is_some();
        let reply = match guest.conversation.take_reply() {
            // What has no room to be written has none to say so, either: without memory CPython also
            // raises other things than `MemoryError`.
            Err(Error::Invalid { .. }) => None,
            Err(_) if refused => None,
            reply => Some(reply),
        };
        let Some(reply) = reply else { return self.out_of_memory(usage) };
        let streams = std::mem::take(&mut guest.streams);
        let result = reply.and_then(|reply| guest.conversation.execution(reply, streams, usage));
        if result.is_ok() {
            self.save_in_background();
        } else {
            // A guest whose agent doesn't answer as it should can't be left like that.
            self.roll_back()?;
        }
        result
    }

    /// One turn that isn't a cell.
    async fn service(&mut self, request: Request) -> Result<Message> {
        let Request { what, message: request } = request;
        let memory_bytes = self.options.limits.memory_bytes;
        let limits = Limits {
            compute: SERVICE_TIME,
            wall: SERVICE_TIME,
            lm_calls: 0,
            tool_calls: 0,
            ..self.options.limits.clone()
        };
        let sent_bytes = request.body.len();
        let turn = self.turn();
        // One that nothing ran to be stopped by.
        self.ties.signal.take();
        let permit = self.permit().await?;
        let session = self.admitted(permit).await?;
        session.guest_mut().streams = Streams::new(QUIET_OUTPUT_BYTES);
        session.guest_mut().conversation.begin(Some(request), &limits);
        let (end, _) = session.turn(turn, &limits).await;
        let guest = session.guest_mut();
        let refused = guest.refused_bytes.take();
        let unfit = || {
            Error::invalid(
                what.as_str(),
                format!(
                    "it does not fit: {} bytes into a memory of {memory_bytes}, of which Python and what \
                     the session holds take a part (raise limits.memory_bytes)",
                    refused.unwrap_or(sent_bytes)
                ),
            )
        };
        let reply = match (guest.fault.take(), end) {
            (Some(fault), _) => Err(fault),
            (None, TurnEnd::Halted(_)) => Err(Error::invalid(
                what.as_str(),
                "it took too long; the session is as it was before",
            )),
            (None, TurnEnd::Returned) if refused.is_none() => {
                match guest.conversation.take_reply() {
                    // The agent got no memory for the request, or none to take it apart.
                    Err(Error::Protocol { .. }) if sent_bytes > 0 => Err(unfit()),
                    Err(Error::Invalid { what, .. }) if what == "MemoryError" => Err(unfit()),
                    reply => reply,
                }
            }
            (None, _) => Err(unfit()),
        };
        // After anything but an answer, what the guest was doing is not known: it goes back.
        if reply.is_ok() && !session.guest().running {
            self.save_in_background();
        } else {
            self.roll_back()?;
        }
        reply
    }
}

impl Drop for WasmEnvironment {
    fn drop(&mut self) {
        release(std::mem::replace(&mut self.phase, Phase::Lost("dropped".into())));
    }
}

/// Lets another session have the instance, in the background.
fn release(phase: Phase) {
    match phase {
        Phase::Ready(session) => session.give_back(),
        Phase::Saving(parking) => parking.abandon(),
        Phase::Asleep(_) | Phase::Lost(_) => {}
    }
}

#[async_trait]
impl Environment for WasmEnvironment {
    fn status(&self) -> Status {
        match self.phase {
            Phase::Ready(_) | Phase::Saving(_) | Phase::Asleep(_) => Status::Ready,
            Phase::Lost(_) => Status::Poisoned,
        }
    }

    fn capabilities(&self) -> Capabilities {
        Self::CAPABILITIES
    }

    fn interrupt(&self) -> Interrupt {
        self.ties.signal.handle()
    }

    async fn execute_opts(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution> {
        // One that nothing ran to be stopped by.
        self.ties.signal.take();
        self.run_cell(code, options).await
    }

    async fn set_variable(&mut self, name: &str, value: Value) -> Result<()> {
        self.service(Request::set(name, &value)?).await.map(drop)
    }

    async fn get_variable(&mut self, name: &str) -> Result<Option<Value>> {
        let request = Request::get(name)?;
        let what = request.what.clone();
        Conversation::value_of(&what, self.service(request).await?)
    }

    async fn list_variables(&mut self) -> Result<Vec<Variable>> {
        Conversation::variables_of(self.service(Request::list()).await?)
    }

    async fn add_context(&mut self, context: Context, index: Option<u32>) -> Result<u32> {
        Conversation::index_of(&self.service(Request::context(context, index)).await?)
    }

    async fn add_history(&mut self, messages: &Json, index: Option<u32>) -> Result<u32> {
        Conversation::index_of(&self.service(Request::history(messages, index)).await?)
    }

    fn lm_usage(&self) -> UsageSummary {
        self.ties.ledger.total()
    }

    fn register_tool(&mut self, tool: Tool) -> Result<()> {
        check_tool(&tool)?;
        self.options.tools.push(tool.clone());
        self.new_tools.push(tool);
        Ok(())
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        let image = self.image.base();
        let session = self.session().await?;
        Ok(Snapshot::new(Saved::capture(&image, session)?))
    }

    async fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let saved = snapshot.data::<Saved>(BACKEND)?;
        saved.check_image(&self.image)?;
        saved.check(&self.options.limits)?;
        if self.status() == Status::Poisoned {
            self.reset().await?;
        }
        let session = self.session().await?;
        let restored = opening::restore(session.guest_mut(), saved)
            .and_then(|()| session.restore(saved.state_for_restore()));
        if let Err(error) = &restored {
            self.phase = Phase::Lost(format!("restoring a snapshot failed: {error}"));
        }
        restored
    }

    async fn fork(&mut self) -> Result<Box<dyn Environment>> {
        Ok(Box::new(self.fork_session().await?))
    }

    async fn reset(&mut self) -> Result<()> {
        self.saved().await;
        // A session that can't be opened leaves the old one what it was.
        let origin = self.image.origin();
        let session = opening::open(&self.shared, &self.image, &self.options, origin, &self.ties)?;
        release(std::mem::replace(&mut self.phase, Phase::Ready(Box::new(session))));
        self.ties.seat.set_memory(0);
        self.new_tools.clear();
        Ok(())
    }

    async fn close(mut self: Box<Self>) -> Result<()> {
        self.close_files().await
    }
}
