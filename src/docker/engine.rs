//! The engine: finding it, what it must be able to do, its images, and what sessions ask of it.

mod report;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bollard::container::AttachContainerResults;
use bollard::models::{ContainerCreateBody, EventMessage, SystemInfo, SystemVersion};
use bollard::query_parameters::{
    AttachContainerOptions, CreateContainerOptions, CreateImageOptions, EventsOptions,
    ListContainersOptions, RemoveContainerOptions,
};
use bollard::{API_DEFAULT_VERSION, Docker};
use futures_util::StreamExt;
use futures_util::future::join_all;

pub use self::report::{EngineReport, examine};
use super::address::{CERTIFICATES, DockerHost, Place};
use super::fault::{Fault, call, engine_at};
use super::verdict::Evidence;
use super::{DockerOptions, Pull};
use crate::error::{Error, Result};
use crate::image::{Progress, ProgressFn};
use crate::process::{Owner, process_started};

/// The label with whose container it is.
pub(super) const OWNER_LABEL: &str = "kaa.owner";
/// The oldest API that this is tested with: Docker 20.10.
const API_MIN: (u32, u32) = (1, 41);
/// How long an engine may take to say who it is.
const HELLO_MAX: Duration = Duration::from_secs(5);
/// How long any other call may take. A busy engine needs seconds for a start.
const CALL_MAX: Duration = Duration::from_secs(60);
/// How long a container that was ended may take to be gone.
const REMOVAL_MAX: Duration = Duration::from_secs(20);
/// The pause before a removal is tried again.
const REMOVAL_PAUSE: Duration = Duration::from_millis(50);
/// How long the engine may take to learn how a container ended. gVisor's take a second.
const EVIDENCE_MAX: Duration = Duration::from_secs(3);

/// A reachable engine.
#[derive(Debug)]
pub(super) struct Engine {
    client: Docker,
    host: String,
    /// Whether it's Podman behind the same API.
    is_podman: bool,
}

/// What sessions have to know of their image.
#[derive(Debug)]
pub(super) struct ImageFacts {
    /// Its content's digest: a name may come to mean another image while sessions are opened.
    pub(super) id: String,
    /// Where it declares volumes. The engine would make writable directories of its disk for them.
    pub(super) volumes: Vec<String>,
}

impl Engine {
    /// Reaches an engine and asks who it is.
    pub(super) async fn connect(host: &DockerHost) -> Result<Self> {
        let client = client(host)?;
        let name = host.address.clone();
        let version = match call(HELLO_MAX, client.version()).await {
            Ok(version) => version,
            Err(Fault::Refused { status, message }) => {
                let fault = Fault::Odd(format!("status {status}: {message}"));
                return Err(fault.of_engine(&name));
            }
            Err(fault) => return Err(fault.of_engine(&name)),
        };
        let is_podman = is_podman(&version);
        let api = version.api_version.unwrap_or_default();
        if numbers(&api).is_none_or(|api| api < API_MIN) {
            return Err(Error::Incompatible {
                what: engine_at(&name),
                expected: format!("API {}.{} or newer (Docker 20.10)", API_MIN.0, API_MIN.1),
                found: format!("API {api} (version {})", version.version.unwrap_or_default()),
            });
        }
        Ok(Self { client, host: name, is_podman })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Refuses an engine that can't do what the options ask for.
    pub(super) async fn check(&self, options: &DockerOptions) -> Result<()> {
        check_runtime(self.is_podman, &self.host, options)?;
        let info = call(HELLO_MAX, self.client.info()).await;
        check_info(&info.map_err(|fault| fault.of_engine(&self.host))?, &self.host, options)
    }

    /// The image of the options, pulled if it's missing and may be.
    pub(super) async fn image(
        &self,
        options: &DockerOptions,
        progress: ProgressFn<'_>,
    ) -> Result<ImageFacts> {
        match self.inspect_image(&options.image).await {
            Ok(facts) => return Ok(facts),
            Err(fault) if !fault.is_missing() => return Err(fault.of_engine(&self.host)),
            Err(_) if options.pull == Pull::Never => {
                let reason = format!(
                    "the Docker engine at {} doesn't have it and it may not be pulled; make or load \
                     it there, or allow that it's pulled",
                    self.host
                );
                return Err(Error::unavailable(format!("the image `{}`", options.image), reason));
            }
            Err(_) => {}
        }
        let started = Instant::now();
        progress(Progress::Begin { step: "pull", bytes: None });
        self.pull(options, progress).await.map_err(|fault| {
            let reason = format!(
                "the Docker engine at {} doesn't have it and could not pull it: {}; check the name, \
                 log in and pull it with `docker pull`, or load it with `docker load`",
                self.host,
                fault.reason()
            );
            Error::unavailable(format!("the image `{}`", options.image), reason)
        })?;
        progress(Progress::End { detail: options.image.clone(), elapsed: started.elapsed() });
        self.inspect_image(&options.image).await.map_err(|fault| fault.of_engine(&self.host))
    }

    async fn inspect_image(&self, name: &str) -> Result<ImageFacts, Fault> {
        let image = call(CALL_MAX, self.client.inspect_image(name)).await?;
        let id = image.id.ok_or_else(|| Fault::Odd("an image without a digest".into()))?;
        let volumes = image.config.and_then(|config| config.volumes).unwrap_or_default();
        Ok(ImageFacts { id, volumes })
    }

    async fn pull(&self, options: &DockerOptions, progress: ProgressFn<'_>) -> Result<(), Fault> {
        let query = CreateImageOptions {
            from_image: Some(with_tag(&options.image)),
            ..CreateImageOptions::default()
        };
        let mut steps = self.client.create_image(Some(query), None, None);
        let pull = async {
            let mut layers: HashMap<String, u64> = HashMap::new();
            while let Some(step) = steps.next().await {
                let step = step?;
                let done = step.progress_detail.and_then(|detail| detail.current);
                let is_download = step.status.as_deref() == Some("Downloading");
                if let (Some(layer), Some(done), true) = (step.id, done, is_download) {
                    layers.insert(layer, u64::try_from(done).unwrap_or_default());
                    progress(Progress::Advance { bytes: layers.values().sum() });
                }
            }
            Ok(())
        };
        call(options.pull_timeout, pull).await
    }

    /// Removes the containers of processes of this host that are dead.
    pub(super) async fn remove_leftovers(&self, me: &Owner) -> Result<()> {
        let query = ListContainersOptions {
            all: true,
            filters: Some(HashMap::from([("label".to_owned(), vec![OWNER_LABEL.to_owned()])])),
            ..ListContainersOptions::default()
        };
        let listed = call(CALL_MAX, self.client.list_containers(Some(query))).await;
        let listed = match listed {
            Ok(listed) => listed,
            // Podman has states of containers that the client can't read. They pass, and until then
            // nothing is lost but this look.
            Err(Fault::Odd(_)) => return Ok(()),
            Err(fault) => return Err(fault.of_engine(&self.host)),
        };
        let leftovers = listed.into_iter().filter_map(|container| {
            let label = container.labels?.remove(OWNER_LABEL)?;
            me.outlived(&label, process_started).then_some(container.id?)
        });
        let removals = leftovers.map(|id| async move { self.remove(&id).await });
        for removed in join_all(removals).await {
            removed.map_err(|fault| fault.of_engine(&self.host))?;
        }
        Ok(())
    }

    pub(super) async fn create(
        &self,
        name: &str,
        body: ContainerCreateBody,
    ) -> Result<String, Fault> {
        let query = CreateContainerOptions {
            name: Some(name.to_owned()),
            ..CreateContainerOptions::default()
        };
        let created = call(CALL_MAX, self.client.create_container(Some(query), body)).await?;
        Ok(created.id)
    }

    pub(super) async fn attach(&self, id: &str) -> Result<AttachContainerResults, Fault> {
        let query = AttachContainerOptions {
            stream: true,
            stdin: true,
            stdout: true,
            stderr: true,
            ..AttachContainerOptions::default()
        };
        call(CALL_MAX, self.client.attach_container(id, Some(query))).await
    }

    pub(super) async fn start(&self, id: &str) -> Result<(), Fault> {
        call(CALL_MAX, self.client.start_container(id, None)).await
    }

    /// Ends and removes a container, and returns when it's gone.
    pub(super) async fn remove(&self, id: &str) -> Result<(), Fault> {
        let deadline = Instant::now() + REMOVAL_MAX;
        loop {
            let query = RemoveContainerOptions { v: true, force: true, link: false };
            match call(REMOVAL_MAX, self.client.remove_container(id, Some(query))).await {
                Ok(()) => return Ok(()),
                Err(fault) if fault.is_missing() => return Ok(()),
                // The engine is at it already, or the container is between two states.
                Err(Fault::Refused { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(REMOVAL_PAUSE).await;
                }
                Err(fault) => return Err(fault),
            }
        }
    }

    /// What the engine knows of a container that has ended, or is about to.
    pub(super) async fn evidence(&self, id: &str) -> Result<Evidence, Fault> {
        let query = EventsOptions {
            // Everything that it remembers: the clocks of both sides may differ.
            since: Some("1".into()),
            filters: Some(HashMap::from([("container".to_owned(), vec![id.to_owned()])])),
            ..EventsOptions::default()
        };
        let mut events = self.client.events(Some(query));
        let mut evidence = Evidence::default();
        let watch = async {
            while let Some(event) = events.next().await {
                if is_end(&event?, &mut evidence) {
                    break;
                }
            }
            Ok(())
        };
        match call(EVIDENCE_MAX, watch).await {
            Ok(()) | Err(Fault::Silent(_)) => {}
            Err(fault) => return Err(fault),
        }
        if evidence.exit_code.is_none() {
            let inspected = call(EVIDENCE_MAX, self.client.inspect_container(id, None)).await;
            let state = match inspected {
                Ok(container) => container.state,
                Err(fault) if fault.is_missing() => None,
                Err(fault) => return Err(fault),
            };
            evidence.is_running = state.and_then(|state| state.running).unwrap_or(false);
        }
        Ok(evidence)
    }
}

fn client(host: &DockerHost) -> Result<Docker> {
    let seconds = CALL_MAX.as_secs();
    let made = match host.place()? {
        Place::Unix(path) => {
            // A directory that may not be entered isn't a socket that isn't there.
            if let Err(error) = path.metadata() {
                return Err(Fault::Unreachable(error.kind()).of_engine(&host.address));
            }
            Docker::connect_with_unix(&path.to_string_lossy(), seconds, API_DEFAULT_VERSION)
        }
        Place::Tcp { authority, certificates: None } => {
            Docker::connect_with_http(authority, seconds, API_DEFAULT_VERSION)
        }
        Place::Tcp { authority, certificates: Some(directory) } => {
            let [ca, cert, key] = certificates(directory)?;
            // The client takes the process's provider of cryptography, and panics without one.
            if rustls::crypto::CryptoProvider::get_default().is_none() {
                let ring = rustls::crypto::ring::default_provider();
                // Somebody else was quicker: that one is as good.
                let _ = ring.install_default();
            }
            Docker::connect_with_ssl(authority, &key, &cert, &ca, seconds, API_DEFAULT_VERSION)
        }
    };
    made.map_err(|error| Fault::from(error).of_engine(&host.address))
}

/// The files of a directory of certificates. The client would only read them later, and would connect
/// without those that it can't read.
fn certificates(directory: &Path) -> Result<[std::path::PathBuf; 3]> {
    let files = CERTIFICATES.map(|name| directory.join(name));
    for file in &files {
        std::fs::File::open(file).map_err(|error| {
            let reason = format!("{}: {error}", file.display());
            Error::invalid("docker.host.certificates", reason)
        })?;
    }
    Ok(files)
}

/// What the engine can't limit.
fn missing_limits(info: &SystemInfo) -> Vec<&'static str> {
    let limits = [
        ("memory", info.memory_limit),
        ("processes", info.pids_limit),
        ("processors", info.cpu_cfs_quota),
    ];
    limits.iter().filter(|(_, has)| *has == Some(false)).map(|(name, _)| *name).collect()
}

fn is_podman(version: &SystemVersion) -> bool {
    version.components.iter().flatten().any(|part| part.name.contains("Podman"))
}

/// A wall that somebody asked for must not be left out in silence.
fn check_runtime(is_podman: bool, host: &str, options: &DockerOptions) -> Result<()> {
    match &options.runtime {
        Some(runtime) if is_podman => Err(Error::Incompatible {
            what: engine_at(host),
            expected: format!(
                "one that starts a container with the runtime `{runtime}` when asked"
            ),
            found: "Podman, which starts it with its own all the same (set it as Podman's default \
                    runtime, and leave it out here)"
                .into(),
        }),
        _ => Ok(()),
    }
}

fn check_info(info: &SystemInfo, host: &str, options: &DockerOptions) -> Result<()> {
    let refuse = |expected: String, found: String| {
        Err(Error::Incompatible { what: engine_at(host), expected, found })
    };
    let system = info.os_type.as_deref().unwrap_or("linux");
    if system != "linux" {
        return refuse("one that runs Linux containers".into(), format!("{system} containers"));
    }
    let missing = missing_limits(info);
    if !missing.is_empty() && !options.allow_missing_limits {
        let expected = "one that can limit memory, processes and processors (rootless ones need \
                        cgroups of version 2, delegated), or that missing limits are allowed";
        return refuse(expected.into(), format!("no limits of {}", missing.join(", ")));
    }
    if let Some(runtime) = &options.runtime {
        let known = info.runtimes.as_ref();
        if known.is_none_or(|known| !known.contains_key(runtime)) {
            let mut names: Vec<&str> =
                known.into_iter().flat_map(|known| known.keys()).map(String::as_str).collect();
            names.sort_unstable();
            let expected = format!("the runtime `{runtime}`, registered in its daemon.json");
            return refuse(expected, names.join(", "));
        }
    }
    let processors = info.ncpu.unwrap_or(i64::MAX);
    if options.cpus > processors as f64 {
        let reason = format!("the engine's machine has {processors}, not {}", options.cpus);
        return Err(Error::invalid("docker.cpus", reason));
    }
    Ok(())
}

/// Takes an event into account; whether it's the last one that matters.
fn is_end(event: &EventMessage, evidence: &mut Evidence) -> bool {
    evidence.is_known = true;
    let attributes = event.actor.as_ref().and_then(|actor| actor.attributes.as_ref());
    let attribute = |name: &str| attributes.and_then(|all| all.get(name));
    match event.action.as_deref() {
        Some("oom") => evidence.has_oom = true,
        Some("kill") => evidence.signal = attribute("signal").cloned(),
        Some("die") => {
            evidence.exit_code = attribute("exitCode").and_then(|code| code.parse().ok());
            return true;
        }
        _ => {}
    }
    false
}

fn numbers(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Without a tag the engine would pull all of them.
fn with_tag(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    if last.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") }
}

#[cfg(test)]
mod tests;
