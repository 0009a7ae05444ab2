//! The host's side of the conversation with the guest agent, the same for every backend.
//!
//! A backend carries bytes and stops the guest; this file knows what they mean. It holds the
//! requests that wait for the guest, answers its calls, and turns reports into results.

mod ending;
mod models;
mod names;
mod requests;
mod signal;
mod sources;

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use serde_json::{Value as Json, json};

pub(crate) use self::ending::not_begun;
pub(crate) use self::names::{check_name, check_reserved, check_tool};
pub(crate) use self::requests::Request;
pub(crate) use self::signal::Signal;
pub(crate) use self::sources::{
    BOOTSTRAP, LOADER, SUPERVISOR, TURN, agent_sources, process_sources,
};
use crate::capture::Capture;
use crate::environment::{
    EnvironmentOptions, Exception, Execution, LmCall, Outcome, Profile, Tool, ToolArgs, ToolError,
    ToolResult, Variable,
};
use crate::error::{Error, Result};
use crate::limits::{Limit, Limits, Usage};
use crate::lm::{Ledger, LmCompletion, LmError, LmHandler, LmRequest};
use crate::protocol::{
    Call, CellReport, Message, ToolCallMessage, VariableReport, decode_answer, decode_within,
};
use crate::snapshot::{SessionRecord, Told};
use crate::tenant::LmQuota;

/// Characters kept of a `repr` in a report of variables.
const REPR_CHARS: usize = 500;
/// Characters kept of the value of a cell's last expression.
const VALUE_CHARS: usize = 65_536;
/// Variables that one report may list; the agent stops earlier.
const VARIABLES_MAX: usize = 1_000;
/// Bytes of prompts and responses that one cell may have exchanged with language models: the host
/// keeps them until the cell ends.
const CALL_BYTES_KEPT_MAX: usize = 256 << 20;
/// Characters that OpenEnv keeps of each stream.
const OPENENV_OUTPUT_CHARS: usize = 8_192;

/// The exception class of a soft stop, as the agent names it.
const LIMIT_EXCEPTION: &str = "LimitReached";

/// What the guest's call needs before it can be answered.
pub(crate) enum Answer {
    /// Nothing.
    Now(Message),
    /// Something outside. The future owns what it needs, so that it can be dropped at any time.
    Later(Pin<Box<dyn Future<Output = Done> + Send>>),
}

/// What came from outside.
pub(crate) enum Done {
    Completion { request: LmRequest, result: Result<LmCompletion, LmError> },
    Batch { requests: Vec<LmRequest>, results: Vec<Result<LmCompletion, LmError>> },
    Tool(ToolResult),
}

/// What a cell has called so far.
#[derive(Default)]
struct Calls {
    /// Bytes of prompts and responses: they are kept for the report.
    bytes: usize,
    lm: u32,
    tools: u32,
    completions: Vec<LmCall>,
    /// Whether the last of them has lent its response to a message.
    is_lent: bool,
}

/// The host's side of one session.
pub(crate) struct Conversation {
    profile: Profile,
    output_chars: Option<usize>,
    lm: Option<Arc<dyn LmHandler>>,
    /// What the tenant may ask of it.
    quota: Option<LmQuota>,
    /// What the session's calls cost so far.
    ledger: Ledger,
    depth: i32,
    tools: BTreeMap<String, Tool>,
    limits: Limits,
    calls: Calls,
    requests: VecDeque<Message>,
    replies: Vec<Message>,
    /// Requests that the guest has and didn't reply to.
    unanswered: usize,
    stop: Option<Limit>,
    cells: u64,
    /// What the guest has to know about its surroundings.
    wanted: Told,
    /// What it knows; none before the first turn whose state is kept.
    told: Option<Told>,
    /// What randomness in the guest's memory starts from.
    seed: Option<String>,
    /// Whether the guest doesn't know that yet.
    reseed: bool,
    sources: Option<Message>,
}

impl Conversation {
    /// The start of a session: the guest is told its profile, seed and tools before anything else.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a tool whose name can't be used.
    pub(crate) fn new(options: &EnvironmentOptions, seed: [u8; 16]) -> Result<Self> {
        Self::start(options, Some(seed))
    }

    /// The start of a session whose guest is that of another: it is told what is different. With a
    /// seed it draws other random numbers than that one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub(crate) fn resume(
        options: &EnvironmentOptions,
        record: &SessionRecord,
        seed: Option<[u8; 16]>,
    ) -> Result<Self> {
        let mut conversation = Self::start(options, seed)?;
        conversation.go_to(record);
        conversation.reseed = seed.is_some();
        Ok(conversation)
    }

    fn start(options: &EnvironmentOptions, seed: Option<[u8; 16]>) -> Result<Self> {
        let env = options.policy.env.iter().cloned().collect();
        let mut conversation = Self {
            profile: options.profile,
            output_chars: match options.profile {
                Profile::Rlm => options.output_chars,
                Profile::OpenEnv => Some(options.output_chars.unwrap_or(OPENENV_OUTPUT_CHARS)),
            },
            lm: options.lm.clone(),
            quota: None,
            ledger: Ledger::default(),
            depth: i32::from(options.depth) + 1,
            tools: BTreeMap::new(),
            limits: options.limits.clone(),
            calls: Calls::default(),
            requests: VecDeque::new(),
            replies: Vec::new(),
            unanswered: 0,
            stop: None,
            cells: 0,
            wanted: Told {
                profile: options.profile.name().to_owned(),
                lm: options.lm.is_some(),
                env,
                allowed_imports: options.policy.allowed_imports.clone(),
                tools: Vec::new(),
            },
            told: None,
            seed: seed.map(|seed| seed.iter().map(|byte| format!("{byte:02x}")).collect()),
            reseed: seed.is_some(),
            sources: None,
        };
        for tool in &options.tools {
            conversation.add_tool(tool.clone())?;
        }
        Ok(conversation)
    }

    /// The guest goes to a state of before, or of another session: what it knew then.
    pub(crate) fn go_to(&mut self, record: &SessionRecord) {
        self.cells = record.cells;
        self.told = record.told.clone();
        self.reseed = self.told.is_none() && self.seed.is_some();
    }

    /// Goes on counting cells from here.
    pub(crate) fn count_cells(&mut self, cells: u64) {
        self.cells = cells;
    }

    /// Why the guest was asked to stop in this turn.
    pub(crate) fn stopped_by(&self) -> Option<Limit> {
        self.stop
    }

    /// Cells that were asked for, and what the guest knows.
    pub(crate) fn record(&self) -> (u64, Option<Told>) {
        (self.cells, self.told.clone())
    }

    /// Makes a tool callable.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when its name is no identifier or reserved.
    pub(crate) fn add_tool(&mut self, tool: Tool) -> Result<()> {
        check_tool(&tool)?;
        self.tools.insert(tool.name().to_owned(), tool);
        self.wanted.tools = self.tools.keys().cloned().collect();
        Ok(())
    }

    /// What the guest has to be told before the next request: again, if its turn is undone.
    fn untold(&self) -> Vec<Message> {
        let Told { profile, lm, env, allowed_imports, tools } = &self.wanted;
        let mut untold = Vec::new();
        let known = self.told.as_ref();
        let same = |told: &Told| {
            let configured = (&told.profile, &told.lm, &told.env, &told.allowed_imports);
            configured == (profile, lm, env, allowed_imports)
        };
        if self.reseed || !known.is_some_and(same) {
            let mut configure = json!({
                "op": "configure", "profile": profile, "value_chars": VALUE_CHARS,
                "repr_chars": REPR_CHARS, "lm": lm,
            });
            if let Some(seed) = self.seed.as_ref().filter(|_| self.reseed) {
                configure["seed"] = seed.as_str().into();
            }
            if !env.is_empty() {
                configure["env"] = json!(env);
            }
            let imports_known = known.map_or(&None, |told| &told.allowed_imports);
            if allowed_imports.is_some() || allowed_imports != imports_known {
                configure["allowed_imports"] = json!(allowed_imports);
            }
            untold.push(Message::new(configure));
        }
        if tools[..] != *known.map_or(&[][..], |told| &told.tools) {
            let tools: Vec<Json> = tools.iter().map(|name| json!({ "name": name })).collect();
            untold.push(Message::new(json!({ "op": "tools", "tools": tools })));
        }
        untold
    }

    /// Lets a guest that has no agent ask for its sources.
    pub(crate) fn offer_sources(&mut self, sources: [(&str, &str); 15]) {
        let mut message = Message::default();
        let mut list = Vec::new();
        for (name, source) in sources {
            list.push(json!([name, message.body.len(), source.len()]));
            message.body.extend_from_slice(source.as_bytes());
        }
        message.header.insert("sources".into(), list.into());
        self.sources = Some(message);
    }

    /// Starts a turn: queues what the guest has to be told and then `request`, and forgets what the
    /// last turn left.
    pub(crate) fn begin(&mut self, request: Option<Message>, limits: &Limits) {
        self.abandon();
        self.limits = limits.clone();
        self.calls = Calls::default();
        self.stop = None;
        if let Some(request) = request {
            if self.reseed || self.told.as_ref() != Some(&self.wanted) {
                self.requests.extend(self.untold());
            }
            self.requests.push_back(request);
        }
    }

    /// The request for a cell of this code.
    pub(crate) fn cell(&mut self, code: &str) -> Message {
        // A snapshot may say that there were as many as can be counted.
        self.cells = self.cells.saturating_add(1);
        let mut message = Message::new(json!({ "op": "exec", "cell": self.cells }));
        message.body = code.as_bytes().to_vec();
        message
    }

    /// Sets what the tenant may ask of language models, and where what they cost is written, from
    /// the next call on.
    pub(crate) fn set_books(&mut self, quota: Option<LmQuota>, ledger: Ledger) {
        self.quota = quota;
        self.ledger = ledger;
    }

    /// Notes why the guest is being stopped; the agent asks when it gets the signal.
    pub(crate) fn stop(&mut self, limit: Limit) {
        self.stop = Some(limit);
    }

    /// Answers what the guest said.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] for what no agent says.
    pub(crate) fn answer(&mut self, call: Call) -> Result<Answer> {
        let message = match call {
            Call::Prompt { recursive, text } => return Ok(self.call_with_text(recursive, text)),
            Call::Message(message) => message,
        };
        match message.text("op") {
            Some("next") => Ok(Answer::Now(self.next_request())),
            Some("done") => {
                // One reply per request: else a cell could fill the host's memory with them.
                if self.unanswered == 0 {
                    return Err(Error::protocol("a reply that nobody asked for"));
                }
                self.unanswered -= 1;
                self.replies.push(message);
                Ok(Answer::Now(self.next_request()))
            }
            Some("why") => Ok(Answer::Now(self.why())),
            Some("lm") => self.call_lm(message),
            Some("tool") => self.call_tool(message),
            Some("sources") if self.sources.is_some() => {
                Ok(Answer::Now(self.sources.take().unwrap_or_default()))
            }
            other => Err(Error::protocol(format!("unknown operation {other:?}"))),
        }
    }

    /// Turns what came from outside into the answer that the guest waits for.
    pub(crate) fn finish(&mut self, done: Done) -> Message {
        match done {
            Done::Tool(Ok(value)) => Message::of_value(value),
            Done::Tool(Err(ToolError { type_name, message })) => {
                Message::new(json!({ "error": message, "type": type_name }))
            }
            Done::Completion { request, result } => self.finish_completion(request, result),
            Done::Batch { requests, results } => self.finish_batch(requests, results),
        }
    }

    /// The agent's reply to the request of this turn, which is the last one.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the turn ended without one, [`Error::Invalid`] with the agent's own
    /// words when it refused the request.
    pub(crate) fn take_reply(&mut self) -> Result<Message> {
        let replies = std::mem::take(&mut self.replies);
        if let Some(error) = replies.iter().find_map(|reply| reply.text("error")) {
            let (what, reason) = error.split_once(": ").unwrap_or(("request", error));
            return Err(Error::invalid(what, reason));
        }
        if !self.requests.is_empty() || self.unanswered > 0 || replies.is_empty() {
            return Err(Error::protocol(
                "the agent ended its turn before it replied to everything",
            ));
        }
        Ok(replies.into_iter().next_back().expect("there is one"))
    }

    /// The state that this turn left is kept: what the guest was told in it need not be told again.
    pub(crate) fn keep(&mut self) {
        self.reseed = false;
        if self.told.as_ref() != Some(&self.wanted) {
            self.told = Some(self.wanted.clone());
        }
    }

    /// Gives up on this turn: nothing of it must reach the next.
    pub(crate) fn abandon(&mut self) {
        self.requests.clear();
        self.replies.clear();
        self.unanswered = 0;
    }

    /// Whether the guest has every request of this turn, so that what stops it stops the last one.
    pub(crate) fn is_told(&self) -> bool {
        self.requests.is_empty()
    }

    /// What the guest has to do next; nothing when its turn is over.
    pub(crate) fn next_request(&mut self) -> Message {
        match self.requests.pop_front() {
            Some(request) => {
                self.unanswered += 1;
                request
            }
            None => Message::default(),
        }
    }

    fn why(&self) -> Message {
        let Some(limit) = self.stop else { return Message::new(json!({ "limit": null })) };
        let message = match limit {
            Limit::Fuel => format!("the cell used up its {} units of fuel", self.limits.fuel),
            Limit::Compute => {
                format!("the cell computed for more than {:?}", self.limits.compute)
            }
            Limit::Wall => format!("the cell took longer than {:?}", self.limits.wall),
            Limit::Interrupt => "interrupted".to_owned(),
        };
        Message::new(json!({ "limit": limit.name(), "message": message }))
    }

    fn call_tool(&mut self, message: Message) -> Result<Answer> {
        let (call, body) = message.parse::<ToolCallMessage>()?;
        let refuse = |type_name: &str, text: String| {
            Ok(Answer::Now(Message::new(json!({ "error": text, "type": type_name }))))
        };
        let Some(tool) = self.tools.get(&call.name) else {
            return refuse("NameError", format!("there is no host tool named {:?}", call.name));
        };
        if self.calls.tools >= self.limits.tool_calls {
            let text = format!("tool call limit exceeded: {} calls", self.limits.tool_calls);
            return refuse("RuntimeError", text);
        }
        self.calls.tools += 1;
        let mut args = ToolArgs::default();
        let mut allowance = body.len();
        for arg in call.args {
            args.args.push(decode_within(arg, &body, &mut allowance)?);
        }
        for (name, arg) in call.kwargs {
            args.kwargs.push((name, decode_within(arg, &body, &mut allowance)?));
        }
        let answer = tool.call(args);
        Ok(Answer::Later(Box::pin(async move { Done::Tool(answer.await) })))
    }

    /// What the cell spent on calls, added to what the backend measured.
    pub(crate) fn usage(&self, measured: Usage) -> Usage {
        Usage { lm_calls: self.calls.lm, tool_calls: self.calls.tools, ..measured }
    }

    /// The result of a cell that ended by itself.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] when the report isn't one.
    pub(crate) fn execution(
        &mut self,
        reply: Message,
        streams: Streams,
        usage: Usage,
    ) -> Result<Execution> {
        let (report, body) = reply.parse::<CellReport>()?;
        let answer = report.final_answer.map(|answer| decode_answer(answer, &body)).transpose()?;
        let exception = report.exception.map(|exception| Exception {
            type_name: exception.type_name,
            message: exception.message,
            traceback: exception.traceback,
        });
        // A cell can catch the soft stop and then raise something else: that's its own outcome.
        let stopped = exception.as_ref().is_some_and(|e| e.type_name == LIMIT_EXCEPTION)
            && self.stop.is_some_and(|limit| limit != Limit::Interrupt);
        let outcome = match report.outcome.as_str() {
            "completed" => Outcome::Completed,
            "raised" if stopped => Outcome::LimitReached,
            "raised" => Outcome::Raised,
            "exited" => Outcome::Exited { code: report.exit_code.unwrap_or(0) as i32 },
            other => return Err(Error::protocol(format!("unknown outcome `{other}`"))),
        };
        Ok(Execution {
            outcome,
            limit: self.stop,
            exception,
            value: report.value,
            variables: variables(report.variables),
            final_answer: answer,
            ..self.stopped(outcome, streams, usage)
        })
    }

    /// The result of a cell that the host had to end; it was rolled back.
    pub(crate) fn stopped(
        &mut self,
        outcome: Outcome,
        streams: Streams,
        usage: Usage,
    ) -> Execution {
        Execution {
            limit: self.stop,
            stdout: streams.stdout.into_output(self.output_chars),
            stderr: streams.stderr.into_output(self.output_chars),
            lm_calls: std::mem::take(&mut self.calls.completions),
            usage: self.usage(usage),
            ..Execution::new(outcome)
        }
    }
}

/// Both streams of a cell.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdout: Capture,
    pub(crate) stderr: Capture,
}

impl Streams {
    /// Empty streams that keep so many bytes each.
    pub(crate) fn new(bytes_max: u64) -> Self {
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        Self { stdout: Capture::new(bytes_max), stderr: Capture::new(bytes_max) }
    }
}

/// The variables of a report.
fn variables(reports: Vec<VariableReport>) -> Vec<Variable> {
    let variable = |report: VariableReport| Variable {
        name: report.name,
        type_name: report.type_name,
        repr: report.repr,
        new: report.new,
    };
    reports.into_iter().take(VARIABLES_MAX).map(variable).collect()
}
