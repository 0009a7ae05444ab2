//! The command line: flags as typed (the structs of clap), what they mean (`session::Plan`), and
//! what is done (`run`, `repl`, `complete`, `image`, `snapshot`, `lm`, `modal`, `doctor`).
//!
//! Only this layer reads the process's environment, prints, and exits. It sees the library through
//! its public API, as any other user.

mod backend;
#[cfg(feature = "benchmark")]
mod bench;
mod branches;
mod complete;
mod completion;
mod console;
#[cfg(feature = "docker")]
mod docker;
#[cfg(not(feature = "docker"))]
#[path = "cli/without_docker.rs"]
mod docker;
mod doctor;
mod flags;
mod image;
mod lm;
#[cfg(feature = "modal")]
mod modal;
#[cfg(not(feature = "modal"))]
#[path = "cli/without_modal.rs"]
mod modal;
mod models;
mod progress;
mod record;
mod repl;
mod run;
mod session;
mod signals;
mod snapshot;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kaa::{Error, Outcome};

use self::console::Console;

const USAGE: u8 = 2;
const LIMIT: u8 = 124;
const FAILED: u8 = 125;
/// 128 and the number of `SIGINT`, as a shell reports it.
const INTERRUPTED: u8 = 130;
/// The same for `SIGTERM`.
const TERMINATED: u8 = 143;

const AFTER_HELP: &str = "\
Exit status, of the last cell:
  0    the cell completed
  1    an exception left it
  N    it ended itself with sys.exit(N); 134 when the guest aborted
  2    wrong usage: a flag, or a file that a flag names
  124  a limit stopped it: fuel, compute time or wall time
  125  Kaa itself could not do its job, or a cell cost a session that isn't wasm's its state and
       there were cells after it, which are not run then
  130  Ctrl-C: the cell and the session are ended before; a second one ends the command at once
  143  SIGTERM, likewise
A cell may exit with these numbers too; `kaa run --json` tells them apart.

Environment:
  KAA_CACHE  directory of images and compiled code (default: `kaa` in the user's cache directory,
             such as ~/.cache/kaa). Only you may have access to it.
  OPENAI_API_KEY, ANTHROPIC_API_KEY
             keys for --model openai:NAME and anthropic:NAME, sent to these providers only; others
             are named with --key-env.
  DOCKER_HOST, DOCKER_TLS_VERIFY, DOCKER_CERT_PATH
             where the Docker engine is, unless --docker-host says, and its certificates.
  MODAL_TOKEN_ID, MODAL_TOKEN_SECRET
             a token for Modal; without them ~/.modal.toml is read. MODAL_PROFILE, MODAL_CONFIG_PATH,
             MODAL_ENVIRONMENT, MODAL_SERVER_URL, MODAL_IMAGE_BUILDER_VERSION and
             MODAL_MAX_THROTTLE_WAIT mean what they mean to Modal's own clients.
  KAA_MODAL_ROOTS
             file of PEM certificates that are trusted at Modal beside the system's.
  PATH       where local sessions find programs: the only variable that they get unasked.
  http_proxy, https_proxy (also in capitals), no_proxy
             the way to models; never for this machine itself.

The first use on a machine downloads and compiles CPython, which takes some minutes and about
600 MB.";

const COMPLETE_AFTER_HELP: &str = "\
Exit status:
  0    there is an answer
  2    wrong usage: a flag, or a file that a flag names
  124  a limit of the run ended it: --max-timeout, --max-budget, --max-tokens, --max-calls, --max-errors
  125  Kaa could not do its job, or the model could not be asked
  130  Ctrl-C
  143  SIGTERM";

/// Runs Python that nobody has read yet, in a WebAssembly sandbox.
///
/// The code sees no files, no network and no environment variables of this machine unless a flag
/// gives them, and can spend only so much time, memory and output. With --backend docker it runs in a
/// container instead, with --backend modal in a sandbox of Modal's cloud; with --backend local it is
/// not isolated.
#[derive(Debug, Parser)]
#[command(name = "kaa", version, after_long_help = AFTER_HELP, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run cells of Python in a new session
    ///
    /// Each cell's output is shown when the cell is done. On a terminal, control characters in it
    /// are shown as ^X instead of being obeyed, since the output is the guest's; elsewhere all
    /// bytes go through unchanged. Cells after one that raised still run.
    #[command(after_long_help = AFTER_HELP)]
    Run(Box<run::RunFlags>),
    /// Type cells of Python into a session
    ///
    /// The value of the last expression is printed. Ctrl-C stops the running cell and keeps the
    /// session. Commands begin with a colon: `:help` lists them. The history is kept in the cache
    /// directory.
    Repl(Box<repl::ReplFlags>),
    /// Answer a question about a context that is too long for a model: the RLM loop
    ///
    /// A model writes cells that look at the context and ask sub-models about parts of it, until it
    /// has the answer. The answer goes to stdout. Ctrl-C ends the run.
    #[command(after_long_help = COMPLETE_AFTER_HELP)]
    Complete(Box<complete::CompleteFlags>),
    /// Make, list and check the images that sessions start from
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Look into snapshot files
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Answer language model calls of others
    #[command(subcommand)]
    Lm(lm::LmCommand),
    /// List and end the sandboxes that sessions have at Modal
    #[command(subcommand)]
    Modal(modal::ModalCommand),
    /// Measure what isolation costs
    #[cfg(feature = "benchmark")]
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Say what works on this machine, and why the rest doesn't
    Doctor(Box<doctor::DoctorFlags>),
}

/// How a command ended that could do its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// As wanted.
    Done,
    /// With this cell's outcome.
    Cell(Outcome),
    /// By a limit of the whole run.
    Limit,
    /// By Ctrl-C.
    Interrupted,
    /// By `SIGTERM`, or the end of its terminal.
    Terminated,
    /// With the finding that Kaa doesn't work here.
    Unusable,
}

/// Why a command could not do its job.
#[derive(Debug)]
enum Failure {
    /// Something that the user typed, or a file named by it.
    Usage(String),
    /// Anything else.
    Failed(String),
    /// Nobody reads the output any more: no reason to complain.
    Closed,
}

impl Failure {
    fn usage(flag: &str, reason: impl std::fmt::Display) -> Self {
        Self::Usage(format!("{flag}: {reason}"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid { .. } => Self::Usage(in_flags(&error.to_string())),
            Error::Internal(_) => Self::Failed(format!("{error}; please report it")),
            Error::Poisoned { reason } => {
                Self::Failed(format!("the session has lost its state: {}", in_flags(&reason)))
            }
            other => Self::Failed(in_flags(&other.to_string())),
        }
    }
}

/// Fields of the library, and the flags that set them.
const FIELDS: &[(&str, &str)] = &[
    ("limits.memory_bytes", "--memory"),
    ("limits.output_bytes", "--output"),
    ("limits.disk_bytes", "--disk"),
    ("limits.fuel", "--fuel"),
    ("limits.compute", "--compute"),
    ("limits.wall", "--wall"),
    ("limits.grace", "--grace"),
    ("docker.host", "--docker-host"),
    ("docker.image", "--docker-image"),
    ("docker.network", "--docker-network"),
    ("docker.runtime", "--docker-runtime"),
    ("docker.user", "--docker-user"),
    ("docker.python", "--python"),
    ("docker.cpus", "--cpus"),
    ("docker.pids", "--pids"),
    ("modal.image", "--modal-image"),
    ("modal.build_timeout", "--modal-build-timeout"),
    ("modal.app", "--modal-app"),
    ("modal.timeout", "--modal-timeout"),
    ("modal.network", "--modal-network"),
    ("modal.secrets", "--modal-secret"),
    ("modal.tags", "--modal-tag"),
    ("modal.patience", "--modal-patience"),
    ("modal.python", "--python"),
    ("modal.cpu", "--cpus"),
    ("policy.env", "--env"),
    ("setup_code", "--setup-code"),
];

/// A message of the library in words of the command line.
fn in_flags(message: &str) -> String {
    let start = message.to_owned();
    FIELDS.iter().fold(start, |message, (field, flag)| message.replace(field, flag))
}

/// Runs the command that was typed.
pub(crate) fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(flags) => run::run(*flags),
        Command::Repl(flags) => repl::run(*flags),
        Command::Complete(flags) => complete::run(*flags),
        Command::Image(command) => image::run(command),
        Command::Snapshot(command) => snapshot::run(command),
        Command::Lm(command) => lm::run(command),
        Command::Modal(command) => modal::run(command),
        #[cfg(feature = "benchmark")]
        Command::Bench(command) => bench::run(command),
        Command::Doctor(flags) => doctor::run(*flags),
    };
    if let Err(Failure::Usage(message) | Failure::Failed(message)) = &result {
        Console::new(false).complain(message);
    }
    ExitCode::from(exit_code(&result))
}

/// The only place where exit codes are decided.
fn exit_code(result: &Result<Ending, Failure>) -> u8 {
    match result {
        Ok(Ending::Done) | Err(Failure::Closed) => 0,
        Ok(Ending::Cell(outcome)) => (cell_code(*outcome) & 0xff) as u8,
        Ok(Ending::Limit) => LIMIT,
        Ok(Ending::Interrupted) => INTERRUPTED,
        Ok(Ending::Terminated) => TERMINATED,
        Ok(Ending::Unusable) | Err(Failure::Failed(_)) => FAILED,
        Err(Failure::Usage(_)) => USAGE,
    }
}

/// The exit code of a cell as its code meant it, before the system cuts it to a byte.
fn cell_code(outcome: Outcome) -> i32 {
    match outcome {
        Outcome::Completed => 0,
        Outcome::Raised => 1,
        Outcome::Exited { code } => code,
        Outcome::LimitReached => LIMIT.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_codes_are_those_of_the_table() {
        for (outcome, code) in [
            (Outcome::Completed, 0),
            (Outcome::Raised, 1),
            (Outcome::Exited { code: 7 }, 7),
            (Outcome::Exited { code: -1 }, 255),
            (Outcome::Exited { code: 256 }, 0),
            (Outcome::Exited { code: 134 }, 134),
            (Outcome::LimitReached, 124),
        ] {
            assert_eq!(exit_code(&Ok(Ending::Cell(outcome))), code, "{outcome:?}");
        }
        assert_eq!(exit_code(&Err(Failure::Closed)), 0);
        assert_eq!(exit_code(&Err(Error::Closed.into())), 125);
        let invalid = Error::Invalid { what: "limits.wall".into(), reason: "too short".into() };
        assert_eq!(exit_code(&Err(invalid.into())), 2);
    }
}
