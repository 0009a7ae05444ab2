//! The flags of sandboxes of Modal, `kaa modal`, and what `kaa doctor` finds of Modal.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use kaa::modal::{
    Carrier, ModalBackend, ModalClient, ModalConfig, ModalImage, ModalOptions, Network,
    SandboxReport, Secret,
};
use kaa::{Capabilities, ProgressFn};
use serde_json::json;

use super::console::{Console, excerpt};
use super::doctor::backends::{Remote, probe};
use super::doctor::{Doctor, Finding};
use super::session::{self, Processes};
use super::units::Span;
use super::{Ending, Failure, in_flags};

/// What sessions in sandboxes can do.
pub(super) const CAPABILITIES: Option<Capabilities> = Some(ModalBackend::CAPABILITIES);
/// What an image's id begins with.
const IMAGE_ID: &str = "im-";
/// Where RLM's broker listens.
const BROKER_PORT: u16 = 8080;
/// How long the doctor waits for Modal.
const DOCTOR_TIME: Duration = Duration::from_secs(20);

/// How sandboxes are made, as typed.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Modal")]
pub(super) struct ModalFlags {
    /// Image of the sandbox: any of a registry with Python 3.9 or newer, or one that Modal has, by its
    /// id (im-…) [default: python:3.11-slim]
    #[arg(long, value_name = "NAME")]
    modal_image: Option<String>,
    /// Package of Python to add to the image, as pip names it; dill lets sessions be saved; may be
    /// repeated
    #[arg(long, value_name = "PACKAGE")]
    modal_pip: Vec<String>,
    /// Package of Debian to add to the image; may be repeated
    #[arg(long, value_name = "PACKAGE")]
    modal_apt: Vec<String>,
    /// Time that building the image may take [default: 30m]
    #[arg(long, value_name = "SECONDS")]
    modal_build_timeout: Option<Span>,
    /// App of the account that the sandboxes belong to; it's made if it isn't there [default: kaa]
    #[arg(long, value_name = "NAME")]
    modal_app: Option<String>,
    /// Environment of the workspace [default: MODAL_ENVIRONMENT, or else the workspace's own]
    #[arg(long, value_name = "NAME")]
    modal_environment: Option<String>,
    /// How long a sandbox lives at most, whatever becomes of this process: 10s to 24h [default: 1h]
    #[arg(long, value_name = "SECONDS")]
    modal_timeout: Option<Span>,
    /// Network of the sandbox: blocked, open, or the addresses that it may reach and no others, as
    /// 10.0.0.0/8,example.org; language models need none [default: blocked]
    #[arg(long, value_name = "blocked|open|ADDRESSES", value_parser = network)]
    modal_network: Option<Network>,
    /// Way of model calls to this process: stdio, the streams of the session's process, or broker, a
    /// queue in the sandbox behind a public tunnel with a token, on port 8080 unless one is given
    /// [default: stdio]
    #[arg(long, value_name = "stdio|broker[:PORT]", value_parser = carrier)]
    modal_carrier: Option<Carrier>,
    /// Secret whose variables cells see: NAME of one that the account has, or env:NAME for a variable
    /// of this process; may be repeated
    #[arg(long, value_name = "NAME|env:NAME")]
    modal_secret: Vec<String>,
    /// Tag of the sandboxes; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    modal_tag: Vec<(String, String)>,
    /// Who cells are in the sandbox, where its image's user is root [default: 65534]
    #[arg(long, value_name = "UID")]
    modal_user: Option<u32>,
    /// How long a broken connection to the sandbox is tried again before the session is given up
    /// [default: 2m]
    #[arg(long, value_name = "SECONDS")]
    modal_patience: Option<Span>,
}

/// How sandboxes are made, as it is meant, and as whom.
#[derive(Debug)]
pub(super) struct ModalPlan {
    config: ModalConfig,
    options: Box<ModalOptions>,
}

impl ModalFlags {
    /// Every flag, and whether it was given.
    pub(super) fn given(&self) -> Vec<(&'static str, bool)> {
        let Self {
            modal_image,
            modal_pip,
            modal_apt,
            modal_build_timeout,
            modal_app,
            modal_environment,
            modal_timeout,
            modal_network,
            modal_carrier,
            modal_secret,
            modal_tag,
            modal_user,
            modal_patience,
        } = self;
        vec![
            ("--modal-image", modal_image.is_some()),
            ("--modal-pip", !modal_pip.is_empty()),
            ("--modal-apt", !modal_apt.is_empty()),
            ("--modal-build-timeout", modal_build_timeout.is_some()),
            ("--modal-app", modal_app.is_some()),
            ("--modal-environment", modal_environment.is_some()),
            ("--modal-timeout", modal_timeout.is_some()),
            ("--modal-network", modal_network.is_some()),
            ("--modal-carrier", modal_carrier.is_some()),
            ("--modal-secret", !modal_secret.is_empty()),
            ("--modal-tag", !modal_tag.is_empty()),
            ("--modal-user", modal_user.is_some()),
            ("--modal-patience", modal_patience.is_some()),
        ]
    }

    /// What is meant. Reads the settings of Modal's own clients.
    pub(super) fn resolve(
        self,
        python: Option<String>,
        setup_code: Option<String>,
        cpus: Option<f64>,
    ) -> Result<ModalPlan, Failure> {
        let environment = self.modal_environment.clone();
        let options = self.options(python, setup_code, cpus)?;
        let config = found(environment)?.0;
        Ok(ModalPlan { config, options: Box::new(options) })
    }

    fn options(
        self,
        python: Option<String>,
        setup_code: Option<String>,
        cpus: Option<f64>,
    ) -> Result<ModalOptions, Failure> {
        let defaults = ModalOptions::default();
        let image = match self.modal_image {
            None => defaults.image,
            Some(id) if id.starts_with(IMAGE_ID) => ModalImage::from_id(id),
            Some(name) => ModalImage::from_registry(name),
        };
        let secrets = self.modal_secret.iter().map(|text| secret(text));
        let span = |span: Option<Span>, default| span.map_or(default, |span| span.0);
        let options = ModalOptions {
            app: self.modal_app.unwrap_or(defaults.app),
            image: image.apt_install(self.modal_apt).pip_install(self.modal_pip),
            build_timeout: span(self.modal_build_timeout, defaults.build_timeout),
            cpu: cpus.unwrap_or(defaults.cpu),
            timeout: span(self.modal_timeout, defaults.timeout),
            network: self.modal_network.unwrap_or(defaults.network),
            carrier: self.modal_carrier.unwrap_or(defaults.carrier),
            secrets: secrets.collect::<Result<_, _>>()?,
            tags: self.modal_tag,
            patience: span(self.modal_patience, defaults.patience),
            user: self.modal_user.unwrap_or(defaults.user),
            setup_code,
            python: python.unwrap_or(defaults.python),
        };
        options.validate()?;
        Ok(options)
    }
}

impl ModalPlan {
    /// Reaches Modal, and lets it build the image if it has to be.
    pub(super) async fn connect(&self, progress: ProgressFn<'_>) -> Result<Processes, Failure> {
        let Self { config, options } = self;
        let backend = ModalBackend::connect(config.clone(), (**options).clone(), progress).await?;
        let loader = backend.clone();
        let load = Box::new(move |path: &Path| loader.load_snapshot(path));
        let what = format!("`{}` in a sandbox of Modal, app `{}`", options.python, options.app);
        Ok(Processes { backend: Arc::new(backend), load, what })
    }
}

/// A way of model calls as typed.
fn carrier(text: &str) -> Result<Carrier, String> {
    let refuse = || Err(format!("{text:?} is neither stdio, broker nor broker:PORT"));
    match text.split_once(':') {
        None if text == "stdio" => Ok(Carrier::Stdio),
        None if text == "broker" => Ok(Carrier::Broker { port: BROKER_PORT }),
        Some(("broker", port)) => match port.parse() {
            Ok(0) | Err(_) => refuse(),
            Ok(port) => Ok(Carrier::Broker { port }),
        },
        _ => refuse(),
    }
}

/// The settings of Modal's own clients, and where the token is from.
fn found(environment: Option<String>) -> Result<(ModalConfig, String), Failure> {
    let (mut config, place) = ModalConfig::find(|name| std::env::var(name).ok())?;
    if let Some(environment) = environment {
        config.environment = environment;
    }
    Ok((config, place))
}

/// A secret as typed. What isn't one is not shown: it may be the secret's value.
fn secret(text: &str) -> Result<Secret, Failure> {
    let refuse = |reason: String| Err(Failure::usage("--modal-secret", reason));
    if text.contains('=') {
        return refuse(
            "a value there is seen by everybody who lists this machine's processes; set a variable to \
             it, and write env:NAME"
                .into(),
        );
    }
    let Some(name) = text.strip_prefix("env:") else { return Ok(Secret::Named(text.into())) };
    match std::env::var(name) {
        Ok(value) => Ok(Secret::Variable { name: name.into(), value }),
        Err(_) => refuse(format!("there is no variable {name:?} of UTF-8 here to copy")),
    }
}

fn tag(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

fn network(text: &str) -> Result<Network, String> {
    let (mut cidrs, mut domains) = (Vec::new(), Vec::new());
    match text {
        "blocked" => return Ok(Network::Blocked),
        "open" => return Ok(Network::Open),
        _ => {}
    }
    for entry in text.split(',').map(str::trim) {
        let is_domain = |c: char| c.is_ascii_alphanumeric() || "-.*".contains(c);
        if let Some(range) = cidr(entry) {
            cidrs.push(range);
        } else if entry.contains('.') && entry.chars().all(is_domain) {
            domains.push(entry.to_owned());
        } else {
            return Err(format!(
                "{entry:?} is no address; write blocked, open, or addresses with commas between them, \
                 as 10.0.0.0/8,example.org"
            ));
        }
    }
    Ok(Network::Allow { cidrs, domains })
}

/// A range of addresses; a single one is a range, too.
fn cidr(text: &str) -> Option<String> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length: u8 = length.map_or(Some(most), |length| length.parse().ok())?;
    (length <= most).then(|| format!("{address}/{length}"))
}

#[derive(Debug, Subcommand)]
pub(super) enum ModalCommand {
    /// List the sandboxes that Kaa has made and that live
    ///
    /// Of each: its id, how long ago it was made, whether the process that it belongs to lives (which
    /// is known of this machine's), and its tags.
    List(ListFlags),
    /// End the sandboxes of dead processes
    ///
    /// Sandboxes of processes that live, or of other machines, stay.
    Clean(CleanFlags),
}

/// Whose sandboxes.
#[derive(Debug, Args)]
struct Scope {
    /// Only those of this app [default: all apps]
    #[arg(long, value_name = "NAME")]
    app: Option<String>,
    /// Environment of the workspace [default: MODAL_ENVIRONMENT, or else the workspace's own]
    #[arg(long, value_name = "NAME")]
    environment: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ListFlags {
    #[command(flatten)]
    scope: Scope,
    /// Print one JSON object per sandbox and line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct CleanFlags {
    #[command(flatten)]
    scope: Scope,
    /// End those of living processes and of other machines as well
    #[arg(long)]
    all: bool,
}

pub(super) fn run(command: ModalCommand) -> Result<Ending, Failure> {
    let console = Console::new(false);
    session::block_on(async {
        match command {
            ModalCommand::List(flags) => list(console, flags).await,
            ModalCommand::Clean(flags) => clean(console, flags).await,
        }
    })
}

async fn sandboxes(scope: Scope) -> Result<(ModalClient, Vec<SandboxReport>), Failure> {
    let client = ModalClient::connect(found(scope.environment)?.0).await?;
    let found = client.sandboxes(scope.app.as_deref()).await.map_err(|error| match error {
        // Where sessions are made another flag has the name.
        kaa::Error::Invalid { reason, .. } => Failure::usage("--app", reason),
        other => other.into(),
    })?;
    Ok((client, found))
}

async fn list(console: Console, flags: ListFlags) -> Result<Ending, Failure> {
    let (_, found) = sandboxes(flags.scope).await?;
    for sandbox in &found {
        match flags.json {
            true => console.line(&record(sandbox).to_string())?,
            false => console.line(&row(sandbox))?,
        }
    }
    if found.is_empty() && !flags.json {
        console.note("Kaa has no sandbox there");
    }
    Ok(Ending::Done)
}

fn record(sandbox: &SandboxReport) -> serde_json::Value {
    let created = sandbox.created_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let tags: serde_json::Map<_, _> =
        sandbox.tags.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    json!({
        "id": sandbox.id, "created_at": created.as_secs_f64(), "has_owner": sandbox.has_owner,
        "tags": tags,
    })
}

/// A sandbox in a list. Its texts are Modal's and others', so control characters aren't obeyed.
fn row(sandbox: &SandboxReport) -> String {
    let age = SystemTime::now().duration_since(sandbox.created_at).unwrap_or_default();
    let owner = match sandbox.has_owner {
        Some(true) => "alive",
        Some(false) => "dead",
        None => "unknown",
    };
    let tags = sandbox.tags.iter().map(|(name, value)| format!("{name}={value}"));
    let tags = excerpt(&tags.collect::<Vec<_>>().join(" "));
    let id = excerpt(&sandbox.id);
    format!("{id:<28} {:>7} min  owner {owner:<8} {tags}", age.as_secs() / 60).trim_end().to_owned()
}

async fn clean(console: Console, flags: CleanFlags) -> Result<Ending, Failure> {
    let (client, found) = sandboxes(flags.scope).await?;
    let (dead, other): (Vec<_>, Vec<_>) =
        found.iter().partition(|sandbox| flags.all || sandbox.has_owner == Some(false));
    let mut failure = None;
    for sandbox in &dead {
        let id = excerpt(&sandbox.id);
        match client.terminate(&sandbox.id).await {
            Ok(()) => console.line(&format!("{id} ended"))?,
            Err(error) => {
                console.line(&format!("{id} not ended"))?;
                failure = Some(error);
            }
        }
    }
    if !other.is_empty() {
        console.note(&format!(
            "{} left, of processes that live or of other machines; `kaa modal list` names them, --all \
             ends them too",
            other.len()
        ));
    } else if dead.is_empty() {
        console.note("there is nothing to end");
    }
    failure.map_or(Ok(Ending::Done), |error| Err(error.into()))
}

/// What `kaa doctor` finds. A sandbox is made only if that is wanted, since it costs something.
pub(super) fn examine(
    doctor: &Doctor,
    flags: ModalFlags,
    python: Option<String>,
    opens: bool,
) -> Result<Remote, Failure> {
    let missing = |what: &str, error: Failure| match error {
        Failure::Usage(reason) | Failure::Failed(reason) => {
            doctor.say(Finding::Missing, what, &reason)?;
            Ok(Remote::default())
        }
        Failure::Closed => Err(Failure::Closed),
    };
    let environment = flags.modal_environment.clone();
    let options = flags.options(python, None, None)?;
    let (config, place) = match found(environment) {
        Ok(found) => found,
        Err(error) => return missing("modal token", error),
    };
    doctor.say(Finding::Ok, "modal token", &format!("of {place}"))?;
    session::block_on(async {
        let connected = tokio::time::timeout(DOCTOR_TIME, ModalClient::connect(config.clone()));
        match connected.await {
            Ok(Ok(_)) => doctor.say(Finding::Ok, "modal server", "it takes the token")?,
            Ok(Err(error)) => return missing("modal server", error.into()),
            Err(_) => {
                let reason = format!("it doesn't answer within {} s", DOCTOR_TIME.as_secs());
                return missing("modal server", Failure::Failed(reason));
            }
        }
        if !opens {
            return Ok(Remote { is_reached: true, saves: None });
        }
        let probe = match ModalBackend::connect(config, options, &|_| {}).await {
            Ok(backend) => probe(&backend).await,
            Err(error) => Err(in_flags(&error.to_string())),
        };
        match probe {
            Ok(probe) => {
                let saves = doctor.probed("modal", &probe, "--modal-pip dill")?;
                Ok(Remote { is_reached: true, saves: Some(saves) })
            }
            Err(reason) => missing("modal python", Failure::Failed(reason)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read() {
        let allow = |cidrs: &[&str], domains: &[&str]| {
            let own = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
            Ok(Network::Allow { cidrs: own(cidrs), domains: own(domains) })
        };
        for (text, expected) in [
            ("blocked", Ok(Network::Blocked)),
            ("open", Ok(Network::Open)),
            ("10.0.0.0/8", allow(&["10.0.0.0/8"], &[])),
            ("1.1.1.1, ::1", allow(&["1.1.1.1/32", "::1/128"], &[])),
            (
                "10.0.0.0/8,example.org,*.pypi.org",
                allow(&["10.0.0.0/8"], &["example.org", "*.pypi.org"]),
            ),
            ("", Err("")),
            ("none", Err("none")),
            ("example.org,", Err("")),
            ("10.0.0.0/33", Err("10.0.0.0/33")),
            ("https://example.org", Err("https://example.org")),
        ] {
            let expected = expected.map_err(|entry| format!("{entry:?} is no address"));
            match (network(text), expected) {
                (Err(error), Err(begin)) => assert!(error.starts_with(&begin), "{text}: {error}"),
                (read, expected) => assert_eq!(read, expected, "{text}"),
            }
        }
    }

    #[test]
    fn the_value_of_a_secret_is_neither_taken_nor_shown() {
        assert_eq!(secret("openai").unwrap(), Secret::Named("openai".into()));
        for (text, part) in [("KEY=hunter2", "env:NAME"), ("env:KAA_NONE", "\"KAA_NONE\"")] {
            let Err(Failure::Usage(reason)) = secret(text) else { panic!("{text} was taken") };
            assert!(reason.contains(part) && !reason.contains("hunter2"), "{reason}");
        }
    }

    #[test]
    fn a_row_obeys_no_control_characters() {
        let sandbox = SandboxReport {
            id: "sb-1\u{1b}[2J".into(),
            created_at: SystemTime::now() - Duration::from_secs(125),
            tags: vec![("kaa-session".into(), "5\n".into()), ("team".into(), "a b".into())],
            has_owner: Some(false),
        };
        let row = row(&sandbox);
        assert!(row.starts_with(r"sb-1\u{1b}[2J"), "{row}");
        assert!(row.ends_with(r"2 min  owner dead     kaa-session=5\n team=a b"), "{row}");
        assert_eq!(record(&sandbox)["tags"]["team"], "a b");
    }
}
