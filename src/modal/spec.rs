//! What a sandbox is to be.

use std::time::Duration;

use super::image::ModalImage;
use super::options::{self, Network, Secret};
use super::proto::client as wire;
use super::proto::client::network_access::NetworkAccessType;
use crate::error::{Error, Result};

/// A sandbox to make.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxSpec {
    /// The app that it belongs to; it's made if there is none of this name. What is to outlive its
    /// process belongs in one without sessions, which end the leftovers of theirs. Default: `kaa`.
    pub app: String,
    /// What is in it. Default: `python:3.11-slim`.
    pub image: ModalImage,
    /// How long building the image may take. Default: 30 min.
    pub build_timeout: Duration,
    /// Processors, in parts of one: what it's promised, and what it has at most. Default: 1.
    pub cpu: f64,
    /// Memory in MiB: what it's promised, and what it has at most. Default: 1,024.
    pub memory_mib: u32,
    /// How long it lives at most, in whole seconds. Default: 1 h.
    pub timeout: Duration,
    /// Its network. Default: none.
    pub network: Network,
    /// Variables that Modal puts into it. Default: none.
    pub secrets: Vec<Secret>,
    /// Its tags, beside those that Kaa gives it. Default: none.
    pub tags: Vec<(String, String)>,
    /// Ports that have a tunnel: an address of Modal's, public and encrypted. Default: none.
    pub ports: Vec<u16>,
    /// Where its processes begin, an absolute path. Default: what the image says.
    pub workdir: Option<String>,
    /// Its first process. Default: one that sleeps.
    pub entrypoint: Vec<String>,
}

impl Default for SandboxSpec {
    fn default() -> Self {
        Self {
            app: "kaa".into(),
            image: ModalImage::default(),
            build_timeout: Duration::from_secs(30 * 60),
            cpu: 1.0,
            memory_mib: 1024,
            timeout: Duration::from_secs(60 * 60),
            network: Network::default(),
            secrets: Vec::new(),
            tags: Vec::new(),
            ports: Vec::new(),
            workdir: None,
            entrypoint: vec!["sleep".into(), "infinity".into()],
        }
    }
}

impl SandboxSpec {
    /// Checks what can be checked without Modal.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the field and what would be right.
    pub fn validate(&self) -> Result<()> {
        options::check_app(&self.app)?;
        self.image.validate()?;
        if !self.ports.is_empty() && self.network == Network::Blocked {
            let reason = "Modal has no tunnels to a sandbox whose network is blocked; allow it nothing \
                          instead: Network::Allow with empty lists";
            return Err(Error::invalid("modal.network", reason));
        }
        if self.workdir.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return Err(Error::invalid("modal.workdir", "must be an absolute path"));
        }
        if self.timeout < Duration::from_secs(1) {
            return Err(Error::invalid("modal.timeout", "must be at least a second"));
        }
        Ok(())
    }

    pub(super) fn definition(&self, image: &str) -> wire::Sandbox {
        let (kind, cidrs, domains) = match &self.network {
            Network::Blocked => (NetworkAccessType::Blocked, Vec::new(), Vec::new()),
            Network::Open => (NetworkAccessType::Open, Vec::new(), Vec::new()),
            Network::Allow { cidrs, domains } => {
                (NetworkAccessType::Allowlist, cidrs.clone(), domains.clone())
            }
        };
        let ports = self
            .ports
            .iter()
            .map(|port| wire::PortSpec { port: (*port).into(), unencrypted: false });
        let ports = wire::PortSpecs { ports: ports.collect() };
        let milli_cpu = (self.cpu * 1000.0).round() as u32;
        wire::Sandbox {
            entrypoint_args: self.entrypoint.clone(),
            image_id: image.into(),
            resources: Some(wire::Resources {
                memory_mb: self.memory_mib,
                milli_cpu,
                memory_mb_max: self.memory_mib,
                milli_cpu_max: milli_cpu,
            }),
            timeout_secs: self.timeout.as_secs().try_into().unwrap_or(u32::MAX),
            workdir: self.workdir.clone(),
            open_ports_oneof: Some(wire::sandbox::OpenPortsOneof::OpenPorts(ports)),
            network_access: Some(wire::NetworkAccess {
                network_access_type: kind.into(),
                allowed_cidrs: cidrs,
                allowed_domains: domains,
            }),
            name: None,
            idle_timeout_secs: None,
        }
    }
}
