//! Sessions of a backend, whatever backend it is.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::Value as Json;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::machine;
use super::script::{self, ANSWER, FIRST_CELL, FIRST_STDOUT};
use super::subject::{Facts, Missed, Subject};
use super::workload::{Block, Workload};
use crate::environment::{
    Backend, Context, Environment, EnvironmentExt, EnvironmentOptions, Outcome, Status,
};
use crate::limits::Limits;
use crate::lm::{LmCompletion, LmError, LmHandler, LmRequest, Prompt};
use crate::rlm::{Rlm, RlmOptions};

/// Long enough for what a backend does after a cell, as a model would take longer to think.
const PAUSE: Duration = Duration::from_millis(1);
/// How long a process may take from its start to its end.
const COLD_TIME: Duration = Duration::from_secs(60);
/// What is read of the output of such a process.
const COLD_BYTES_MAX: u64 = 64 << 10;
/// Sessions of a sample of [`Workload::Memory`]: no more than these, and no longer than that.
const IDLE_SESSIONS_MAX: usize = 100;
const IDLE_SESSIONS_MIN: usize = 4;
const IDLE_TIME: Duration = Duration::from_secs(2);
/// Memory that changes by less than this from one look to the next is what it stays, for now. What ended
/// before gives its memory back when the kernel gets to it.
const STEADY_BYTES: u64 = 256 << 10;
const LOOK_AFTER: Duration = Duration::from_millis(200);
const LOOKS_MAX: usize = 50;
/// How long sessions are opened and closed for a sample of [`Workload::Rate`].
const RATE_TIME: Duration = Duration::from_secs(1);
/// Of a context of 100 MB there may be two copies.
const MEMORY_BYTES: u64 = 1 << 30;

/// Sessions of a backend as a subject.
///
/// ```no_run
/// use std::sync::Arc;
/// use kaa::benchmark::{Sessions, Suite};
/// use kaa::{LocalBackend, LocalOptions};
///
/// # async fn example() {
/// let mine = Arc::new(LocalBackend::new(LocalOptions::default()));
/// let suite = Suite::default().subject(Sessions::new("mine", "a process of mine", mine));
/// println!("{}", suite.run(&|_| {}).await.markdown());
/// # }
/// ```
pub struct Sessions {
    source: Source,
    cells: Option<Box<dyn Environment>>,
    cpu: Option<Box<dyn Environment>>,
}

/// Where sessions come from.
struct Source {
    name: String,
    what: String,
    backend: Arc<dyn Backend>,
    /// Where the set that computes runs, if elsewhere.
    cpu_backend: Option<Arc<dyn Backend>>,
    cold: Option<(std::path::PathBuf, Vec<String>)>,
    limits: Limits,
    is_here: bool,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("name", &self.source.name).finish_non_exhaustive()
    }
}

/// Says yes: at once, or after a while.
struct Yes;

#[async_trait]
impl LmHandler for Yes {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        if request.prompt.to_text().starts_with(script::SLOW) {
            tokio::time::sleep(Workload::MODEL_TIME).await;
        }
        Ok(LmCompletion { response: ANSWER.into(), ..LmCompletion::default() })
    }
}

/// Plays the model of the loop: a cell per turn. To calls of cells it says yes.
struct Turns(Vec<&'static str>);

#[async_trait]
impl LmHandler for Turns {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let response = match &request.prompt {
            Prompt::Messages(Json::Array(messages)) => {
                let said = messages.iter().filter(|message| message["role"] == "assistant").count();
                let cell =
                    self.0.get(said).ok_or_else(|| LmError::new("there are no more cells"))?;
                format!("```repl\n{cell}\n```")
            }
            _ => ANSWER.into(),
        };
        Ok(LmCompletion { response, ..LmCompletion::default() })
    }
}

impl Sessions {
    /// Sessions of `backend`, in a column called `name`; `what` says what cells run in.
    pub fn new(
        name: impl Into<String>,
        what: impl Into<String>,
        backend: Arc<dyn Backend>,
    ) -> Self {
        // Limits that no workload reaches, and beyond them what an embedder has.
        let limits = Limits {
            memory_bytes: MEMORY_BYTES,
            lm_calls: u32::MAX,
            compute: Duration::from_secs(600),
            wall: Duration::from_secs(600),
            ..Limits::default()
        };
        let source = Source {
            name: name.into(),
            what: what.into(),
            backend,
            cpu_backend: None,
            cold: None,
            limits,
            is_here: true,
        };
        Self { source, cells: None, cpu: None }
    }

    /// The process that is timed for [`Workload::Cold`]: it has to print `2` and a line feed.
    #[must_use]
    pub fn cold(
        mut self,
        program: impl Into<std::path::PathBuf>,
        arguments: impl IntoIterator<Item = String>,
    ) -> Self {
        self.source.cold = Some((program.into(), arguments.into_iter().collect()));
        self
    }

    /// Other sessions for the set that computes: those that have numpy, which others don't begin with.
    #[must_use]
    pub fn cpu(mut self, backend: Arc<dyn Backend>) -> Self {
        self.source.cpu_backend = Some(backend);
        self
    }

    /// Other limits than those of the suite.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.source.limits = limits;
        self
    }

    /// Sessions that are on another machine, whose memory can't be seen.
    #[must_use]
    pub fn elsewhere(mut self) -> Self {
        self.source.is_here = false;
        self
    }
}

impl Source {
    fn options(&self) -> EnvironmentOptions {
        let limits = self.limits.clone();
        EnvironmentOptions { limits, lm: Some(Arc::new(Yes)), ..EnvironmentOptions::default() }
    }

    async fn open(&self) -> Result<Box<dyn Environment>, Missed> {
        Ok(self.backend.open(self.options()).await?)
    }

    /// A session in which the set that computes is defined.
    async fn open_cpu(&self) -> Result<Box<dyn Environment>, Missed> {
        let backend = self.cpu_backend.as_ref().unwrap_or(&self.backend);
        let mut session = backend.open(self.options()).await?;
        expect(&mut *session, script::CPU, "").await?;
        Ok(session)
    }

    /// A process, from its start to its first output.
    async fn cold_process(&self) -> Result<f64, Missed> {
        let none = || Missed::because("it has no process of its own");
        let (program, arguments) = self.cold.as_ref().ok_or_else(none)?;
        cold_process(program, arguments).await
    }

    async fn session(&self) -> Result<f64, Missed> {
        let since = Instant::now();
        let mut session = self.open().await?;
        expect(&mut *session, FIRST_CELL, FIRST_STDOUT).await?;
        let elapsed = since.elapsed();
        session.close().await?;
        Ok(elapsed.as_secs_f64())
    }

    async fn context(&self, bytes: usize) -> Result<f64, Missed> {
        let context = Context::Text(script::text(bytes));
        let mut session = self.open().await?;
        let since = Instant::now();
        session.add_context(context, None).await?;
        expect(&mut *session, "print(len(context))", &format!("{bytes}\n")).await?;
        let elapsed = since.elapsed();
        session.close().await?;
        Ok(elapsed.as_secs_f64())
    }

    async fn agent(&self) -> Result<f64, Missed> {
        let since = Instant::now();
        let mut session = self.open().await?;
        let mut said = String::new();
        for cell in script::cells(script::AGENT) {
            said = print(&mut *session, cell).await?;
        }
        session.close().await?;
        let elapsed = since.elapsed();
        check(&said, script::AGENT_STDOUT)?;
        Ok(elapsed.as_secs_f64())
    }

    async fn rlm(&self) -> Result<f64, Missed> {
        let environment = EnvironmentOptions { lm: None, ..self.options() };
        let options = RlmOptions { environment, ..RlmOptions::default() };
        let turns = Arc::new(Turns(script::rlm_cells()));
        let rlm = Rlm::new(Arc::clone(&self.backend), turns, options)?;
        let context = Context::Text(script::text(script::RLM_BYTES));
        let since = Instant::now();
        let run = rlm.complete(context, Some("How many needles are there?")).await;
        let elapsed = since.elapsed();
        let run = run.map_err(|error| Missed::because(error.to_string()))?;
        check(&run.response, script::RLM_ANSWER)?;
        Ok(elapsed.as_secs_f64())
    }

    /// Opens sessions that are kept, and says by how much of this machine's memory each.
    async fn idle(&self, held: &mut Vec<Box<dyn Environment>>) -> Result<f64, Missed> {
        if !self.is_here {
            return Err(Missed::because("its memory is on another machine"));
        }
        let unknown = || Missed::because("this system doesn't tell how much memory is used");
        let before = steady_memory().await.ok_or_else(unknown)?;
        let since = Instant::now();
        let mut count = 0;
        while count < IDLE_SESSIONS_MIN
            || (count < IDLE_SESSIONS_MAX && since.elapsed() < IDLE_TIME)
        {
            let mut session = self.open().await?;
            expect(&mut *session, FIRST_CELL, FIRST_STDOUT).await?;
            held.push(session);
            count += 1;
        }
        let after = steady_memory().await.ok_or_else(unknown)?;
        Ok(after.saturating_sub(before) as f64 / count as f64)
    }

    async fn memory(&self, block: &Block) -> Result<Vec<f64>, Missed> {
        let mut held = Vec::new();
        let mut samples = Vec::new();
        // The first sessions take what earlier ones have left, and what all share.
        let result = async {
            self.idle(&mut held).await?;
            for _ in 0..block.samples {
                samples.push(self.idle(&mut held).await?);
            }
            Ok(())
        };
        let result: Result<(), Missed> = result.await;
        // All of them, also if one can't be.
        let mut closed = Ok(());
        for session in held {
            closed = closed.and(session.close().await);
        }
        result?;
        closed?;
        Ok(samples)
    }

    async fn rate(&self) -> Result<f64, Missed> {
        let tasks = std::thread::available_parallelism().map_or(1, usize::from);
        let since = Instant::now();
        // With the set its tasks end, whatever they wait for.
        let mut running = JoinSet::new();
        for _ in 0..tasks {
            let (backend, options) = (Arc::clone(&self.backend), self.options());
            running.spawn(async move {
                let mut count = 0_u32;
                while since.elapsed() < RATE_TIME {
                    let mut session = backend.open(options.clone()).await?;
                    expect(&mut *session, FIRST_CELL, FIRST_STDOUT).await?;
                    session.close().await?;
                    count += 1;
                }
                Ok::<_, Missed>(count)
            });
        }
        let mut count = 0;
        while let Some(task) = running.join_next().await {
            count += task.map_err(|error| Missed::because(error.to_string()))??;
        }
        Ok(f64::from(count) / since.elapsed().as_secs_f64())
    }
}

impl Sessions {
    /// The session of workloads that need one which is warm.
    async fn cells(&mut self) -> Result<&mut dyn Environment, Missed> {
        if self.cells.as_ref().is_none_or(|cells| cells.status() == Status::Poisoned) {
            self.cells = Some(self.source.open().await?);
        }
        Ok(&mut **self.cells.as_mut().expect("it was just opened"))
    }

    async fn cpu_session(&mut self) -> Result<&mut dyn Environment, Missed> {
        if self.cpu.as_ref().is_none_or(|cpu| cpu.status() == Status::Poisoned) {
            self.cpu = Some(self.source.open_cpu().await?);
        }
        Ok(&mut **self.cpu.as_mut().expect("it was just opened"))
    }

    async fn sample(&mut self, workload: Workload) -> Result<f64, Missed> {
        match workload {
            Workload::Cold => self.source.cold_process().await,
            Workload::Session => self.source.session().await,
            Workload::Cell => {
                let session = self.cells().await?;
                let since = Instant::now();
                expect(session, FIRST_CELL, FIRST_STDOUT).await?;
                Ok(since.elapsed().as_secs_f64())
            }
            Workload::LlmQuery => clocked(self.cells().await?, &script::calls()).await,
            Workload::Batch => {
                let (code, stdout) = script::batch();
                let session = self.cells().await?;
                let since = Instant::now();
                expect(session, &code, &stdout).await?;
                Ok(since.elapsed().as_secs_f64())
            }
            Workload::Context { megabytes } => {
                self.source.context(megabytes as usize * 1_000_000).await
            }
            Workload::Agent => self.source.agent().await,
            Workload::Rlm => self.source.rlm().await,
            Workload::Cpu(part) => clocked(self.cpu_session().await?, &script::cpu(part)).await,
            Workload::Rate => self.source.rate().await,
            Workload::Memory => Err(Missed::because("it's measured in one go")),
        }
    }
}

#[async_trait]
impl Subject for Sessions {
    fn name(&self) -> &str {
        &self.source.name
    }

    async fn describe(&mut self) -> Result<Facts, Missed> {
        let session = self.cells().await?;
        let python = print(session, "import sys; print(sys.version.split()[0])").await?;
        Ok(Facts::new(
            &self.source.what,
            python.trim(),
            self.source.backend.capabilities().isolated,
        ))
    }

    async fn measure(&mut self, workload: Workload, block: &Block) -> Result<Vec<f64>, Missed> {
        if workload == Workload::Memory {
            return self.source.memory(block).await;
        }
        let since = Instant::now();
        let mut samples = Vec::with_capacity(block.samples);
        while block.goes_on(samples.len(), since) {
            samples.push(self.sample(workload).await?);
            pause().await;
        }
        Ok(samples)
    }

    async fn close(&mut self) {
        for session in [self.cells.take(), self.cpu.take()].into_iter().flatten() {
            // The figures are there; what can't be given back goes with the process.
            let _ = session.close().await;
        }
    }
}

/// How long a process takes to the first line of its output, which has to be that of the first cell.
pub(super) async fn cold_process(
    program: &std::path::Path,
    arguments: &[String],
) -> Result<f64, Missed> {
    let failed = |error: std::io::Error| Missed::because(format!("{}: {error}", program.display()));
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let all = async {
        let since = Instant::now();
        let mut child = command.spawn().map_err(failed)?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Missed::because("its process has no output"));
        };
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout.take(COLD_BYTES_MAX));
        stdout.read_line(&mut line).await.map_err(failed)?;
        let elapsed = since.elapsed();
        // Each pipe is closed as soon as enough was read: whoever writes more into it ends by that.
        let (out, err) = tokio::join!(rest_of(stdout), rest_of(stderr.take(COLD_BYTES_MAX)));
        let (rest, words) = (out.map_err(failed)?, err.map_err(failed)?);
        check(&(line + &rest), FIRST_STDOUT)
            .map_err(|Missed(reason)| Missed::because(format!("{reason}; {}", words.trim())))?;
        child.wait().await.map_err(failed)?;
        Ok(elapsed.as_secs_f64())
    };
    let all = tokio::time::timeout(COLD_TIME, all);
    all.await.unwrap_or_else(|_| Err(Missed::because("its process didn't end")))
}

async fn rest_of(mut stream: impl AsyncRead + Unpin) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// This machine's used memory, once nothing moves it any more.
async fn steady_memory() -> Option<u64> {
    let mut last = machine::memory_used()?;
    for _ in 0..LOOKS_MAX {
        tokio::time::sleep(LOOK_AFTER).await;
        let now = machine::memory_used()?;
        if now.abs_diff(last) < STEADY_BYTES {
            return Some(now);
        }
        last = now;
    }
    Some(last)
}

fn check(found: &str, wanted: &str) -> Result<(), Missed> {
    if found == wanted {
        return Ok(());
    }
    let found: String = found.chars().take(200).collect();
    Err(Missed::because(format!("it says {found:?} instead of {wanted:?}")))
}

/// What a cell prints; it has to complete.
async fn print(session: &mut dyn Environment, code: &str) -> Result<String, Missed> {
    let execution = session.execute(code).await?;
    if execution.outcome != Outcome::Completed {
        let exception = execution.exception.as_ref();
        let reason = exception.map(|e| match (&*e.type_name, &*e.message) {
            ("ModuleNotFoundError", message) => {
                let module = message.split('\'').nth(1).unwrap_or("such module");
                format!("there is no {module} in its Python")
            }
            (kind, message) => format!("{kind}: {message}"),
        });
        return Err(Missed(
            reason.unwrap_or_else(|| format!("the cell {}", execution.outcome.name())),
        ));
    }
    Ok(execution.stdout.text().into_owned())
}

async fn expect(session: &mut dyn Environment, code: &str, stdout: &str) -> Result<(), Missed> {
    check(&print(session, code).await?, stdout)
}

/// The seconds that a cell prints.
async fn clocked(session: &mut dyn Environment, code: &str) -> Result<f64, Missed> {
    let said = print(session, code).await?;
    script::seconds(&said)
        .ok_or_else(|| Missed::because(format!("it says {said:?}, which is no time")))
}

/// What the suite has between two samples: a millisecond, in which what is in the background runs, and the
/// processor doesn't sleep, whose wake-up would be in the next sample.
pub async fn pause() {
    let since = Instant::now();
    for _ in 0..3 {
        tokio::task::yield_now().await;
    }
    while since.elapsed() < PAUSE {
        std::hint::spin_loop();
    }
}
