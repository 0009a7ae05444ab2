//! What a sandbox is to be.

use std::time::Duration;

use super::image::ModalImage;
use super::options::{self, Network, Secret};
use super::proto::client as wire;
use super::proto::client::network_access::NetworkAccessType;
use crate::error::{Error, Result};

/// The shortest life: it's said in whole seconds.
const TIMEOUT_MIN: Duration = Duration::from_secs(1);

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
    /// How long it lives at most, in whole seconds: 1 s to 24 h. Default: 1 h.
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
        if self.memory_mib == 0 {
            return Err(Error::invalid("modal.memory_mib", "must be at least 1"));
        }
        if self.ports.contains(&0) {
            return Err(Error::invalid("modal.ports", "a port must be 1 to 65535"));
        }
        options::check_count("modal.ports", self.ports.len())?;
        options::check_cpu(self.cpu)?;
        options::check_timeout(self.timeout, TIMEOUT_MIN)?;
        options::check_network(&self.network)?;
        options::check_secrets(&self.secrets)?;
        options::check_tags(&self.tags)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let fine = SandboxSpec::default;
        let own = ("kaa-owner".to_owned(), "me".to_owned());
        let variable = Secret::Variable { name: "A=B".into(), value: "v".into() };
        let network = Network::Allow { cidrs: vec!["10.0.0.0/8".into(); 101], domains: Vec::new() };
        for (field, spec) in [
            ("modal.app", SandboxSpec { app: "a b".into(), ..fine() }),
            ("modal.image", SandboxSpec { image: ModalImage::from_registry(""), ..fine() }),
            ("modal.cpu", SandboxSpec { cpu: f64::NAN, ..fine() }),
            ("modal.cpu", SandboxSpec { cpu: -1.0, ..fine() }),
            ("modal.cpu", SandboxSpec { cpu: f64::INFINITY, ..fine() }),
            ("modal.memory_mib", SandboxSpec { memory_mib: 0, ..fine() }),
            ("modal.timeout", SandboxSpec { timeout: Duration::from_millis(999), ..fine() }),
            ("modal.timeout", SandboxSpec { timeout: Duration::from_secs(86_401), ..fine() }),
            ("modal.network", SandboxSpec { ports: vec![80], ..fine() }),
            ("modal.network", SandboxSpec { network, ..fine() }),
            ("modal.ports", SandboxSpec { ports: vec![0], network: Network::Open, ..fine() }),
            ("modal.ports", SandboxSpec { ports: vec![1; 101], network: Network::Open, ..fine() }),
            ("modal.secrets", SandboxSpec { secrets: vec![variable], ..fine() }),
            (
                "modal.secrets",
                SandboxSpec { secrets: vec![Secret::Named(String::new())], ..fine() },
            ),
            ("modal.tags", SandboxSpec { tags: vec![own], ..fine() }),
            ("modal.tags", SandboxSpec { tags: vec![("t".into(), String::new()); 101], ..fine() }),
            ("modal.workdir", SandboxSpec { workdir: Some("here".into()), ..fine() }),
        ] {
            let error = spec.validate().unwrap_err().to_string();
            assert!(error.starts_with(field), "{field}: {error}");
        }
        for seconds in [1, 86_400] {
            let timeout = Duration::from_secs(seconds);
            assert!(SandboxSpec { timeout, ..fine() }.validate().is_ok());
        }
    }
}
