//! `kaa lm`: language model calls without a session.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use clap::{Args, Subcommand};
use kaa::lm::{
    LmCompletion, LmError, LmHandler, LmKind, LmRequest, LmServer, LmServerOptions, LmToken,
    UsageSummary,
};

use super::console::Console;
use super::flags::reason;
use super::models::LmFlags;
use super::signals::Signals;
use super::units::{Count, Size, Span};
use super::{Ending, Failure, session};

/// No token is longer, whatever the file is.
const TOKEN_FILE_BYTES_MAX: u64 = 64 << 10;

#[derive(Debug, Subcommand)]
pub(super) enum LmCommand {
    /// Answer RLM's environments as its LM handler does
    ///
    /// Prints `listening on HOST:PORT` once it does, and answers until Ctrl-C (exit status 130) or
    /// SIGTERM (0). Then it says what the answers cost; calls that were dropped are not in it.
    /// Calls that name no known model go to --model, and those of depth 1 to --sub-model.
    Serve(Box<ServeFlags>),
}

#[derive(Debug, Args)]
pub(super) struct ServeFlags {
    /// Where to listen; port 0 lets the system choose. Addresses that other machines reach need a
    /// token
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: String,
    #[command(flatten)]
    token: TokenFlags,
    #[command(flatten)]
    lm: LmFlags,
    /// Connections at once; more wait until one ends
    #[arg(
        long, value_name = "NUMBER", help_heading = "Limits",
        default_value_t = Count(LmServerOptions::default().connections_max as u64)
    )]
    max_connections: Count,
    /// Bytes of a request
    #[arg(
        long, value_name = "BYTES", help_heading = "Limits",
        default_value_t = Size(LmServerOptions::default().request_bytes_max as u64)
    )]
    request_bytes: Size,
    /// Bytes of the answers in a reply, without the prompts that it repeats
    #[arg(
        long, value_name = "BYTES", help_heading = "Limits",
        default_value_t = Size(LmServerOptions::default().reply_bytes_max as u64)
    )]
    reply_bytes: Size,
    /// Prompts in a batch
    #[arg(
        long, value_name = "NUMBER", help_heading = "Limits",
        default_value_t = Count(LmServerOptions::default().prompts_max as u64)
    )]
    max_prompts: Count,
    /// Prompts of a batch that are asked at once
    #[arg(
        long, value_name = "NUMBER", help_heading = "Limits",
        default_value_t = Count(LmServerOptions::default().batch_concurrency as u64)
    )]
    batch_concurrency: Count,
    /// Time for the answer to a request, a batch as a whole; then prompts without answer fail.
    /// RLM's clients wait for 300 seconds
    #[arg(
        long, value_name = "SECONDS", help_heading = "Limits",
        default_value_t = Span(LmServerOptions::default().answer_timeout)
    )]
    timeout: Span,
}

/// The secret that requests must carry.
#[derive(Debug, Args)]
struct TokenFlags {
    /// Environment variable with a token that every request must carry as `"token"`; space around
    /// it is ignored
    #[arg(long, value_name = "NAME", conflicts_with = "token_file")]
    token_env: Option<String>,
    /// File with that token; space around it is ignored
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

pub(super) fn run(command: LmCommand) -> Result<Ending, Failure> {
    let LmCommand::Serve(flags) = command;
    let token = match (&flags.token.token_env, &flags.token.token_file) {
        (Some(name), _) => Some(token_of_env("--token-env", name)?),
        (None, Some(path)) => Some(token_of_file("--token-file", path)?),
        (None, None) => None,
    };
    let request_bytes_max = at_least_one("--request-bytes", flags.request_bytes.0)?;
    let defaults = LmServerOptions::default();
    let options = LmServerOptions {
        token,
        request_bytes_max,
        // The largest request needs room.
        arriving_bytes_max: defaults.arriving_bytes_max.max(request_bytes_max),
        reply_bytes_max: at_least_one("--reply-bytes", flags.reply_bytes.0)?,
        connections_max: at_least_one("--max-connections", flags.max_connections.0)?,
        prompts_max: at_least_one("--max-prompts", flags.max_prompts.0)?,
        batch_concurrency: at_least_one("--batch-concurrency", flags.batch_concurrency.0)?,
        answer_timeout: flags.timeout.0,
        ..defaults
    };
    let router = flags.lm.router()?.ok_or_else(|| {
        Failure::Usage("nobody would answer: say who, for example with --lm-script FILE".into())
    })?;
    let handler = Arc::new(router.with_depths_of_rlm());
    let counter = Arc::new(Counter { handler, spent: Mutex::default() });
    session::block_on(serve(&flags.listen, counter, options))
}

fn at_least_one(flag: &str, number: u64) -> Result<usize, Failure> {
    match usize::try_from(number) {
        Ok(1..) => Ok(number as usize),
        Ok(0) => Err(Failure::usage(flag, "it must be more than 0")),
        Err(_) => Err(Failure::usage(flag, "this machine can't count so far")),
    }
}

async fn serve(
    address: &str,
    counter: Arc<Counter>,
    options: LmServerOptions,
) -> Result<Ending, Failure> {
    let console = Console::new(false);
    let mut signals = Signals::listen()?;
    let handler: Arc<dyn LmHandler> = counter.clone();
    let server = LmServer::bind(address, handler, options).await.map_err(|error| match error {
        // The flag names what the library calls the listen address.
        kaa::Error::Invalid { reason, .. } => Failure::usage("--listen", reason),
        kaa::Error::Io { .. } => Failure::usage("--listen", error),
        other => other.into(),
    })?;
    console.line(&format!("listening on {}", server.local_addr()))?;
    let mut ending = Ending::Done;
    server
        .serve(async {
            // A server is there to be ended by SIGTERM.
            if signals.next().await == Ending::Interrupted {
                ending = Ending::Interrupted;
            }
        })
        .await;
    for line in counter.spent().lines() {
        console.note(&line);
    }
    Ok(ending)
}

/// A token that an environment variable holds.
fn token_of_env(flag: &str, name: &str) -> Result<LmToken, Failure> {
    let flag = format!("{flag} {name}");
    let text = std::env::var(name).map_err(|error| {
        Failure::usage(
            &flag,
            match error {
                std::env::VarError::NotPresent => "it is not set here",
                std::env::VarError::NotUnicode(_) => "its value is not UTF-8",
            },
        )
    })?;
    LmToken::new(text.trim()).map_err(|error| Failure::usage(&flag, reason(error)))
}

/// A token that a file holds.
fn token_of_file(flag: &str, path: &Path) -> Result<LmToken, Failure> {
    let refuse = |reason: String| Failure::usage(flag, format!("{}: {reason}", path.display()));
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text))
        .map_err(|e| refuse(e.to_string()))?;
    LmToken::new(text.trim()).map_err(|error| refuse(reason(error)))
}

/// Passes calls on and counts what they cost.
struct Counter {
    handler: Arc<dyn LmHandler>,
    spent: Mutex<Spent>,
}

/// What was answered; a call that its client left has no result to count.
#[derive(Debug, Clone, Default)]
struct Spent {
    usage: UsageSummary,
    failed: u64,
}

impl Counter {
    fn count(&self, result: &Result<LmCompletion, LmError>) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(completion) => spent.usage.add(&completion.usage),
            Err(error) => {
                spent.usage.add(&error.usage);
                spent.failed += 1;
            }
        }
    }

    fn spent(&self) -> Spent {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Spent {
    /// For people: the sum, then each model.
    fn lines(&self) -> Vec<String> {
        let cost = |cost: Option<f64>| cost.map_or(String::new(), |cost| format!(", ${cost:.6}"));
        let line = |name: &str, calls: u64, input: u64, output: u64, price: Option<f64>| {
            format!("{name}: {calls} calls, {input} tokens in, {output} out{}", cost(price))
        };
        let all = &self.usage;
        let sum =
            line("answered", all.calls(), all.input_tokens(), all.output_tokens(), all.cost());
        let mut lines = vec![match self.failed {
            0 => sum,
            failed => format!("{sum}; {failed} failed"),
        }];
        lines.extend(all.models().map(|usage| {
            // Clients name models: no line break of theirs may look like a line of this output.
            let name = usage.model.escape_debug().to_string();
            line(&name, usage.calls, usage.input_tokens, usage.output_tokens, usage.cost)
        }));
        lines
    }
}

#[async_trait]
impl LmHandler for Counter {
    fn model_name(&self, depth: i32) -> Option<&str> {
        self.handler.model_name(depth)
    }

    fn nests(&self, kind: LmKind) -> bool {
        self.handler.nests(kind)
    }

    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let result = self.handler.complete(request).await;
        self.count(&result);
        result
    }

    /// The server asks for one at a time, so that a batch which is dropped leaves out only the calls
    /// that were under way.
    async fn complete_batch(
        &self,
        requests: &[LmRequest],
        concurrency: usize,
    ) -> Vec<Result<LmCompletion, LmError>> {
        let results = self.handler.complete_batch(requests, concurrency).await;
        results.iter().for_each(|result| self.count(result));
        results
    }
}
