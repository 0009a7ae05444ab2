//! The flags of containers, and the engine that they are about.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use kaa::docker::{
    DockerBackend, DockerHost, DockerOptions, EngineReport, Network, Pull, examine as ask,
};
use kaa::{Capabilities, ProgressFn};

use super::Failure;
use super::doctor::backends::probe;
use super::doctor::{Doctor, Finding};
use super::session::{self, Processes};
use super::units::Span;

/// What sessions in containers can do.
pub(super) const CAPABILITIES: Option<Capabilities> = Some(DockerBackend::CAPABILITIES);

/// How containers are made, as typed.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Docker")]
pub(super) struct DockerFlags {
    /// Image of the container: any with Python 3.9 or newer; with dill in it, sessions can be saved
    /// [default: python:3.11-slim]
    #[arg(long, value_name = "NAME")]
    docker_image: Option<String>,
    /// Engine: unix:///PATH or tcp://HOST:PORT [default: DOCKER_HOST, or else the first socket at which
    /// Docker or Podman listens]
    #[arg(long, value_name = "ADDRESS")]
    docker_host: Option<String>,
    /// Network of the container: none, bridge, or the name of one made by `docker network create`;
    /// language models need none [default: none]
    #[arg(long, value_name = "NAME")]
    docker_network: Option<String>,
    /// OCI runtime, such as `runsc` for gVisor; the engine must know it [default: the engine's own]
    #[arg(long, value_name = "NAME")]
    docker_runtime: Option<String>,
    /// Who cells are in the container [default: 65534:65534]
    #[arg(long, value_name = "UID:GID")]
    docker_user: Option<String>,
    /// When the image is pulled from its registry [default: missing]
    #[arg(long, value_enum)]
    docker_pull: Option<PullFlag>,
    /// Time that a pull may take [default: 30m]
    #[arg(long, value_name = "SECONDS")]
    docker_pull_timeout: Option<Span>,
    /// Takes an engine that can't limit memory, processes or processors, as rootless ones on old
    /// systems can't
    #[arg(long)]
    docker_allow_missing_limits: bool,
    /// Processes and threads that a container may have at a time, at least 16 [default: 128]
    #[arg(long, value_name = "NUMBER")]
    pids: Option<u32>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PullFlag {
    /// If the engine doesn't have it
    Missing,
    /// Never: without it there is no session
    Never,
}

/// How containers are made, as it is meant.
#[derive(Debug)]
pub(super) struct DockerPlan(DockerOptions);

impl DockerFlags {
    /// Every flag, and whether it was given.
    pub(super) fn given(&self) -> Vec<(&'static str, bool)> {
        let Self {
            docker_image,
            docker_host,
            docker_network,
            docker_runtime,
            docker_user,
            docker_pull,
            docker_pull_timeout,
            docker_allow_missing_limits,
            pids,
        } = self;
        vec![
            ("--docker-image", docker_image.is_some()),
            ("--docker-host", docker_host.is_some()),
            ("--docker-network", docker_network.is_some()),
            ("--docker-runtime", docker_runtime.is_some()),
            ("--docker-user", docker_user.is_some()),
            ("--docker-pull", docker_pull.is_some()),
            ("--docker-pull-timeout", docker_pull_timeout.is_some()),
            ("--docker-allow-missing-limits", *docker_allow_missing_limits),
            ("--pids", pids.is_some()),
        ]
    }

    /// Takes this OCI runtime, whatever was typed.
    #[cfg(feature = "benchmark")]
    pub(super) fn set_runtime(&mut self, runtime: &str) {
        self.docker_runtime = Some(runtime.to_owned());
    }

    /// What is meant.
    pub(super) fn resolve(
        self,
        python: Option<String>,
        setup_code: Option<String>,
        cpus: Option<f64>,
    ) -> Result<DockerPlan, Failure> {
        let defaults = DockerOptions::default();
        let options = DockerOptions {
            host: host(self.docker_host)?,
            image: self.docker_image.unwrap_or(defaults.image),
            pull: match self.docker_pull {
                None | Some(PullFlag::Missing) => Pull::Missing,
                Some(PullFlag::Never) => Pull::Never,
            },
            pull_timeout: self.docker_pull_timeout.map_or(defaults.pull_timeout, |span| span.0),
            network: match self.docker_network.as_deref() {
                None | Some("none") => Network::None,
                Some("bridge") => Network::Bridge,
                Some(name) => Network::Named(name.to_owned()),
            },
            runtime: self.docker_runtime,
            cpus: cpus.unwrap_or(defaults.cpus),
            pids: self.pids.unwrap_or(defaults.pids),
            user: self.docker_user.unwrap_or(defaults.user),
            setup_code,
            python: python.unwrap_or(defaults.python),
            allow_missing_limits: self.docker_allow_missing_limits,
        };
        options.validate()?;
        Ok(DockerPlan(options))
    }
}

impl DockerPlan {
    /// The flags by which another process of this program makes the same containers. Its interpreter is
    /// `--python`'s matter.
    #[cfg(feature = "benchmark")]
    pub(super) fn arguments(&self) -> Vec<String> {
        let options = &self.0;
        let network = match &options.network {
            Network::None => "none",
            Network::Bridge => "bridge",
            Network::Named(name) => name,
        };
        let pids = options.pids.to_string();
        let mut arguments: Vec<&str> = vec!["--docker-image", &options.image];
        arguments.extend(["--docker-host", &options.host.address, "--docker-network", network]);
        arguments.extend(["--docker-user", &options.user, "--pids", &pids]);
        if let Some(runtime) = &options.runtime {
            arguments.extend(["--docker-runtime", runtime]);
        }
        if options.allow_missing_limits {
            arguments.push("--docker-allow-missing-limits");
        }
        arguments.into_iter().map(str::to_owned).collect()
    }

    /// Whether containers are on this machine, as far as the engine's address tells.
    #[cfg(feature = "benchmark")]
    pub(super) fn is_here(&self) -> bool {
        self.0.host.socket().is_some()
    }

    /// What engine it is, and its version.
    #[cfg(feature = "benchmark")]
    pub(super) async fn engine(&self) -> Result<String, Failure> {
        Ok(ask(&self.0.host, &self.0.image).await?.engine)
    }

    /// Reaches the engine, and pulls the image if it has to be.
    pub(super) async fn connect(&self, progress: ProgressFn<'_>) -> Result<Processes, Failure> {
        let options = &self.0;
        let backend = DockerBackend::connect(options.clone(), progress).await?;
        let loader = backend.clone();
        let load = Box::new(move |path: &Path| loader.load_snapshot(path));
        let mut what = format!("`{}` in a container of `{}`", options.python, options.image);
        if let Some(runtime) = &options.runtime {
            what = format!("{what}, runtime `{runtime}`");
        }
        Ok(Processes { backend: Arc::new(backend), load, what })
    }
}

/// The engine that is named, by flag or by variable, or the first that answers at one of its usual
/// places.
fn host(named: Option<String>) -> Result<DockerHost, Failure> {
    let hosts = DockerHost::candidates(|name| match (name, &named) {
        ("DOCKER_HOST", Some(address)) => Some(address.clone()),
        _ => std::env::var(name).ok(),
    });
    if let [host] = &hosts[..] {
        return Ok(host.clone());
    }
    let answers = |host: &&DockerHost| {
        host.socket().is_some_and(|socket| UnixStream::connect(socket).is_ok())
    };
    let there = |host: &&DockerHost| host.socket().is_some_and(|socket| socket.exists());
    // One that is there but doesn't answer has its own reason for that, which connecting tells.
    let found = hosts.iter().find(answers).or_else(|| hosts.iter().find(there));
    found.cloned().ok_or_else(|| {
        let places: Vec<&str> = hosts.iter().map(|host| host.address.as_str()).collect();
        Failure::Failed(format!(
            "no Docker engine was found at {}; start one, or name its address with --docker-host or \
             in DOCKER_HOST",
            places.join(", ")
        ))
    })
}

/// What `kaa doctor` finds: whether sessions in containers can be saved; `None` when there can't be any.
pub(super) fn examine(
    doctor: &Doctor,
    flags: DockerFlags,
    python: Option<String>,
) -> Result<Option<bool>, Failure> {
    let plan = match flags.resolve(python, None, None) {
        // There is no engine.
        Err(Failure::Failed(reason)) => {
            doctor.say(Finding::Missing, "docker engine", &reason)?;
            return Ok(None);
        }
        plan => plan?,
    };
    let options = plan.0;
    session::block_on(async {
        let report = match ask(&options.host, &options.image).await {
            Ok(report) => report,
            Err(error) => {
                doctor.say(
                    Finding::Missing,
                    "docker engine",
                    &super::in_flags(&error.to_string()),
                )?;
                return Ok(None);
            }
        };
        if !say_engine(doctor, &report, &options)? {
            return Ok(None);
        }
        let options = DockerOptions { pull: Pull::Never, ..options };
        let probe = match DockerBackend::connect(options, &|_| {}).await {
            Ok(backend) => probe(&backend).await,
            Err(error) => Err(super::in_flags(&error.to_string())),
        };
        match probe {
            Ok(probe) => {
                let remedy = "take an image that has it: see guest/Dockerfile and --docker-image";
                doctor.probed("docker", &probe, remedy).map(Some)
            }
            Err(reason) => {
                doctor.say(Finding::Missing, "docker python", &reason)?;
                Ok(None)
            }
        }
    })
}

/// Says what the engine said; whether a container can be tried.
fn say_engine(
    doctor: &Doctor,
    report: &EngineReport,
    options: &DockerOptions,
) -> Result<bool, Failure> {
    let EngineReport { engine, api, system, .. } = report;
    let rootless = if report.is_rootless { ", rootless" } else { "" };
    let text = format!("{engine} at {}, API {api}, {system}{rootless}", options.host.address);
    doctor.say(Finding::Ok, "docker engine", &text)?;
    if !report.missing_limits.is_empty() {
        let missing = report.missing_limits.join(", ");
        let text = format!(
            "none of {missing}: rootless engines need cgroups v2, delegated to the user; \
             --docker-allow-missing-limits does without"
        );
        doctor.say(Finding::Note, "docker limits", &text)?;
    }
    let default = &report.default_runtime;
    let text = format!("{} (default: {default})", report.runtimes.join(" "));
    doctor.say(Finding::Ok, "docker runtimes", &text)?;
    let image = &options.image;
    if report.has_image {
        doctor.say(Finding::Ok, "docker image", &format!("{image} is there"))?;
    } else {
        let text =
            format!("{image} isn't there: the first session pulls it, or `docker pull {image}`");
        doctor.say(Finding::Note, "docker image", &text)?;
    }
    Ok(report.has_image)
}
