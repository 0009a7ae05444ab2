//! What an engine says about itself, for whoever wants to know why it can or can't be used.

use super::{Engine, HELLO_MAX, missing_limits};
use crate::docker::address::DockerHost;
use crate::docker::fault::call;
use crate::error::Result;

/// What an engine says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineReport {
    /// The engine's program, as `Docker Engine` or `Podman Engine`, and its version.
    pub engine: String,
    /// The newest version of the API that it speaks.
    pub api: String,
    /// Its system, and the version of its cgroups.
    pub system: String,
    /// Whether it runs without the rights of root.
    pub is_rootless: bool,
    /// The OCI runtimes that containers can have, sorted; `runsc` is gVisor.
    pub runtimes: Vec<String>,
    /// The runtime of containers that ask for none.
    pub default_runtime: String,
    /// What it can't limit, of memory, processes and processors.
    pub missing_limits: Vec<&'static str>,
    /// Whether it has the image that was asked for.
    pub has_image: bool,
}

/// Asks an engine about itself, and whether it has this image. Nothing is pulled or started.
///
/// # Errors
///
/// [`Error::Invalid`](crate::Error::Invalid) for an address that is none,
/// [`Error::Unavailable`](crate::Error::Unavailable) when nobody answers there,
/// [`Error::Incompatible`](crate::Error::Incompatible) for an engine that is too old.
pub async fn examine(host: &DockerHost, image: &str) -> Result<EngineReport> {
    let engine = Engine::connect(host).await?;
    let version = call(HELLO_MAX, engine.client.version()).await;
    let version = version.map_err(|fault| fault.of_engine(&engine.host))?;
    let info = call(HELLO_MAX, engine.client.info()).await;
    let info = info.map_err(|fault| fault.of_engine(&engine.host))?;
    let has_image = match engine.inspect_image(image).await {
        Ok(_) => true,
        Err(fault) if fault.is_missing() => false,
        Err(fault) => return Err(fault.of_engine(&engine.host)),
    };
    let name = if engine.is_podman { "Podman" } else { "Docker" };
    let missing_limits = missing_limits(&info);
    let system = info.operating_system.unwrap_or_else(|| "an unknown system".into());
    let cgroups = info.cgroup_version.map(|cgroups| format!(", cgroups v{cgroups}"));
    let mut runtimes: Vec<String> =
        info.runtimes.into_iter().flatten().map(|(name, _)| name).collect();
    runtimes.sort_unstable();
    let options = info.security_options.unwrap_or_default();
    Ok(EngineReport {
        engine: format!("{name} {}", version.version.unwrap_or_default()),
        api: version.api_version.unwrap_or_default(),
        system: format!("{system}{}", cgroups.unwrap_or_default()),
        is_rootless: options.iter().any(|option| option.contains("name=rootless")),
        runtimes,
        default_runtime: info.default_runtime.unwrap_or_default(),
        missing_limits,
        has_image,
    })
}
