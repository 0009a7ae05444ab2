//! The flags of a session, as typed, and what they mean.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use kaa::lm::LmHandler;
use kaa::{
    Clock, Context, EnvironmentOptions, Limits, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, Mount,
    OUTPUT_BYTES_MAX, Policy, Profile, Value,
};

use super::Failure;
use super::backend::{BackendFlags, Kind};
use super::models::LmFlags;
use super::session::Plan;
use super::units::{Count, Size, Span, megabytes};

/// The last second that a clock of nanoseconds since 1970 can show.
const CLOCK_SECONDS_MAX: u64 = u64::MAX / 1_000_000_000;

/// What a session starts from, may reach and may spend.
#[derive(Debug, Args)]
pub(super) struct SessionFlags {
    /// Image that a wasm session starts from; see `kaa image list` [default: base]
    #[arg(long, value_name = "NAME", help_heading = "Session", conflicts_with = "snapshot_in")]
    image: Option<String>,
    /// Snapshot file of the same backend to go on from, with its variables; on wasm also with its
    /// image, its files in /tmp, its profile, and unless given here its seed and clock
    #[arg(long, value_name = "FILE", help_heading = "Session")]
    snapshot_in: Option<PathBuf>,
    /// File to save the session to when it ends; whoever reads it sees all variables
    #[arg(long, value_name = "FILE", help_heading = "Session")]
    snapshot_out: Option<PathBuf>,
    /// Dialect of helpers that cells find: `rlm` has context, llm_query and answer; `openenv` also
    /// prints the last value [default: rlm]
    #[arg(long, value_enum, help_heading = "Session")]
    profile: Option<ProfileFlag>,
    /// Text that cells find as `context`, exactly as it is in the file; `-` reads stdin. Must be
    /// UTF-8
    #[arg(long, value_name = "FILE|-", help_heading = "Session")]
    context: Option<PathBuf>,
    /// JSON that cells find as `context`, as objects; next to --context it is `context_1`
    #[arg(long, value_name = "FILE", help_heading = "Session")]
    context_json: Option<PathBuf>,
    /// Variable that cells find, its value in JSON; may be repeated
    #[arg(long, value_name = "NAME=JSON", value_parser = variable, help_heading = "Session")]
    var: Vec<(String, Value)>,
    /// Makes all randomness of a wasm session reproducible
    #[arg(long, value_name = "NUMBER", help_heading = "Session")]
    seed: Option<u64>,
    /// Lets the clock of a wasm session start at this time, in seconds since 1970, and move only with the
    /// session's own steps; with --seed every run is the same
    #[arg(
        long, value_name = "SECONDS", help_heading = "Session",
        value_parser = clap::value_parser!(u64).range(..=CLOCK_SECONDS_MAX)
    )]
    fixed_clock: Option<u64>,
    /// Wheel of the wasm guest, if it has to be set up on a machine without network
    #[arg(long, value_name = "PATH", help_heading = "Session")]
    wheel: Option<PathBuf>,

    /// Host directory that cells see at the path GUEST, read-only unless `:rw` follows; may be
    /// repeated. Local cells see all of yours anyway
    #[arg(long, value_name = "HOST:GUEST[:rw]", value_parser = mount, help_heading = "Reach")]
    mount: Vec<Mount>,
    /// Environment variable that cells see; NAME alone copies it from here; may be repeated
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = env, help_heading = "Reach")]
    env: Vec<(String, Option<String>)>,
    /// Module that cells may import, and no others; may be repeated. Guides a model, isn't the wall
    #[arg(
        long, value_name = "NAME", help_heading = "Reach",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    allow_import: Vec<String>,
    #[command(flatten)]
    lm: LmFlags,
    #[command(flatten)]
    backend: BackendFlags,

    #[command(flatten)]
    limits: LimitFlags,
}

/// Limits, all of them finite.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitFlags {
    /// Work per cell of wasm, in units of about one WebAssembly instruction; the same code costs the
    /// same everywhere [default: 1e12]
    #[arg(long, value_name = "UNITS", value_parser = fuel)]
    fuel: Option<Count>,
    /// Time per cell that Python computes, not waits: `10`, `10s`, `500ms`, `2m`
    #[arg(long, value_name = "SECONDS", default_value_t = Span(Limits::default().compute))]
    compute: Span,
    /// Time per cell from begin to end
    #[arg(long, value_name = "SECONDS", default_value_t = Span(Limits::default().wall))]
    wall: Span,
    /// Compute time to end by itself for a cell that a limit stops; after it a wasm session goes back
    /// to the state before the cell, and another one loses its state
    #[arg(long, value_name = "SECONDS", default_value_t = Span(Limits::default().grace))]
    grace: Span,
    /// Memory of the session in bytes, Python itself included: `512M`, `2G`; 64M to 4G
    #[arg(
        long, value_name = "BYTES", value_parser = memory,
        default_value_t = Size(Limits::default().memory_bytes)
    )]
    memory: Size,
    /// Bytes kept of a cell's stdout and of its stderr; the rest is dropped and counted
    #[arg(
        long, value_name = "BYTES", value_parser = output,
        default_value_t = Size(Limits::default().output_bytes)
    )]
    output: Size,
    /// Bytes of files in the session's /tmp, and written to mounts; local: of each file
    #[arg(long, value_name = "BYTES", default_value_t = Size(Limits::default().disk_bytes))]
    disk: Size,
    /// Prompts that a cell may send to language models
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::default().lm_calls)]
    lm_calls: u32,
    /// Calls of host functions that a cell may make
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::default().tool_calls)]
    tool_calls: u32,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProfileFlag {
    Rlm,
    Openenv,
}

impl SessionFlags {
    /// What is meant. Reads the files that flags name; `stdin_taken` says by what stdin is read.
    pub(super) fn resolve(self, stdin_taken: Option<&str>) -> Result<Plan, Failure> {
        self.check_backend()?;
        let limits = self.limits.resolve();
        let contexts = self.contexts(stdin_taken, limits.memory_bytes)?;
        if let Some(wheel) = &self.wheel {
            exists("--wheel", wheel)?;
        }
        for mount in &self.mount {
            if !mount.host.is_dir() {
                let reason = format!("{} is not a directory", mount.host.display());
                return Err(Failure::usage("--mount", reason));
            }
        }
        let lm = self.lm.resolve()?;
        let policy = Policy {
            mounts: self.mount,
            env: self.env.into_iter().map(host_value).collect::<Result<_, _>>()?,
            clock: self.fixed_clock.map_or(Clock::Real, |s| Clock::Fixed(s * 1_000_000_000)),
            seed: self.seed,
            allowed_imports: (!self.allow_import.is_empty()).then_some(self.allow_import),
        };
        policy.validate()?;
        let profile = match self.profile {
            None | Some(ProfileFlag::Rlm) => Profile::Rlm,
            Some(ProfileFlag::Openenv) => Profile::OpenEnv,
        };
        // Loops of children, too, are the root model's; their depth alone would say otherwise.
        let root_model = lm.as_ref().and_then(|router| {
            let root = router.default_model(0);
            (root != router.default_model(1)).then(|| root.to_owned())
        });
        let lm = lm.map(|router| router as Arc<dyn LmHandler>);
        let options = EnvironmentOptions { limits, policy, profile, lm, ..Default::default() };
        if let Some(path) = &self.snapshot_out {
            check_snapshot_out(path)?;
        }
        Ok(Plan {
            place: self.backend.resolve(self.image, self.wheel)?,
            options,
            root_model,
            contexts,
            variables: self.var,
            snapshot_in: self.snapshot_in,
            snapshot_out: self.snapshot_out,
        })
    }

    /// Refuses what means nothing on the backend: no flag is ever ignored.
    fn check_backend(&self) -> Result<(), Failure> {
        self.backend.check(&[
            ("--fuel", self.limits.fuel.is_some()),
            ("--image", self.image.is_some()),
            ("--wheel", self.wheel.is_some()),
            ("--seed", self.seed.is_some()),
            ("--fixed-clock", self.fixed_clock.is_some()),
            ("--mount", !self.mount.is_empty()),
        ])?;
        let is_in_snapshot = self.backend.kind() == Kind::Wasm && self.snapshot_in.is_some();
        if is_in_snapshot && self.profile.is_some() {
            let reason = "it cannot be used with --snapshot-in: the snapshot has its own";
            return Err(Failure::usage("--profile", reason));
        }
        Ok(())
    }

    fn contexts(&self, stdin_taken: Option<&str>, bytes_max: u64) -> Result<Vec<Context>, Failure> {
        let mut contexts = Vec::new();
        if let Some(path) = &self.context {
            if path == Path::new("-")
                && let Some(other) = stdin_taken
            {
                return Err(Failure::usage("--context -", format!("stdin is already {other}")));
            }
            contexts.push(Context::Text(read("--context", path, bytes_max, MEMORY)?));
        }
        if let Some(path) = &self.context_json {
            if path == Path::new("-") {
                return Err(Failure::usage(
                    "--context-json",
                    "stdin can't be used here; name a file",
                ));
            }
            contexts.push(Context::Json(read("--context-json", path, bytes_max, MEMORY)?));
        }
        Ok(contexts)
    }
}

impl LimitFlags {
    fn resolve(&self) -> Limits {
        let fuel = self.fuel.map_or(Limits::default().fuel, |units| units.0);
        Limits {
            fuel,
            compute: self.compute.0,
            wall: self.wall.0,
            grace: self.grace.0,
            memory_bytes: self.memory.0,
            output_bytes: self.output.0,
            disk_bytes: self.disk.0,
            lm_calls: self.lm_calls,
            tool_calls: self.tool_calls,
            ..Limits::default()
        }
    }
}

/// What a context is too large for.
const MEMORY: &str = "than the session's memory; see --memory";

/// Reads a file or stdin. One that is longer is said to be larger than `what`.
fn read(flag: &str, path: &Path, bytes_max: u64, what: &str) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let result = if path == Path::new("-") {
        std::io::stdin().lock().take(bytes_max + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_end(&mut bytes))
    };
    result.map_err(|e| Failure::usage(flag, format!("reading {}: {e}", path.display())))?;
    if bytes.len() as u64 > bytes_max {
        return Err(Failure::usage(flag, format!("{} is larger {what}", path.display())));
    }
    Ok(bytes)
}

/// Reads a file of text.
pub(super) fn read_text(flag: &str, path: &Path, bytes_max: u64) -> Result<String, Failure> {
    let what = format!("than {}, the most that is read", megabytes(bytes_max));
    String::from_utf8(read(flag, path, bytes_max, &what)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::usage(flag, format!("{} is not UTF-8 at byte {at}", path.display()))
    })
}

/// Whether a snapshot can be written there, before a session runs that would be lost.
fn check_snapshot_out(path: &Path) -> Result<(), Failure> {
    let refuse = |reason: String| Err(Failure::usage("--snapshot-out", reason));
    if path.is_dir() {
        return refuse(format!("{} is a directory; name a file", path.display()));
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
            refuse(format!("there is no directory {}", parent.display()))
        }
        _ => Ok(()),
    }
}

/// Whether a file or directory that a flag names is there.
pub(super) fn exists(flag: &str, path: &Path) -> Result<(), Failure> {
    let reason = |e| Failure::usage(flag, format!("{}: {e}", path.display()));
    std::fs::metadata(path).map(drop).map_err(reason)
}

fn host_value((name, value): (String, Option<String>)) -> Result<(String, String), Failure> {
    let refuse = |reason: &str| Failure::usage(&format!("--env {name}"), reason);
    match value {
        Some(value) => Ok((name, value)),
        None => match std::env::var(&name) {
            Ok(value) => Ok((name, value)),
            Err(std::env::VarError::NotPresent) => {
                Err(refuse("it is not set here; write NAME=VALUE to give it a value"))
            }
            Err(std::env::VarError::NotUnicode(_)) => Err(refuse("its value is not UTF-8")),
        },
    }
}

fn env(text: &str) -> Result<(String, Option<String>), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    Ok((name.to_owned(), value))
}

fn variable(text: &str) -> Result<(String, Value), String> {
    let (name, json) =
        text.split_once('=').ok_or("write NAME=JSON, for example n=5 or s='\"text\"'")?;
    let value: serde_json::Value = serde_json::from_str(json).map_err(|e| {
        format!("what follows the `=` must be JSON ({e}); a text needs quotes: {name}='\"text\"'")
    })?;
    // JSON's reader makes a float of what no machine word holds; Python has integers of any size.
    let digits = json.trim().trim_start_matches('-');
    if value.is_f64() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok((name.to_owned(), Value::BigInt(json.trim().to_owned())));
    }
    Ok((name.to_owned(), value.into()))
}

fn mount(text: &str) -> Result<Mount, String> {
    Mount::parse(text).map_err(reason)
}

/// The part of the library's message that clap's own doesn't say.
pub(super) fn reason(error: kaa::Error) -> String {
    match error {
        kaa::Error::Invalid { reason, .. } => reason,
        other => other.to_string(),
    }
}

fn fuel(text: &str) -> Result<Count, String> {
    let count: Count = text.parse()?;
    match count.0 {
        0 => Err("it must be more than 0".into()),
        units if units > i64::MAX as u64 => Err(format!("it must be at most {}", i64::MAX)),
        _ => Ok(count),
    }
}

fn memory(text: &str) -> Result<Size, String> {
    within(text, MEMORY_BYTES_MIN, MEMORY_BYTES_MAX)
}

fn output(text: &str) -> Result<Size, String> {
    within(text, 0, OUTPUT_BYTES_MAX)
}

fn within(text: &str, min: u64, max: u64) -> Result<Size, String> {
    let size: Size = text.parse()?;
    if (min..=max).contains(&size.0) {
        return Ok(size);
    }
    Err(format!("it must be between {} and {}", Size(min), Size(max)))
}
