//! Which Docker engine tests and benchmarks use: the one that the command line would.

#![allow(dead_code, reason = "every user of this needs a part of it")]

use bollard::{API_DEFAULT_VERSION, Docker};
use kaa::docker::{DockerBackend, DockerHost, DockerOptions};

/// The engine that `DOCKER_HOST` names, or the first whose socket is there.
pub(crate) fn host() -> DockerHost {
    let hosts = DockerHost::candidates(|name| std::env::var(name).ok());
    let is_there = |host: &&DockerHost| host.socket().is_none_or(std::path::Path::exists);
    hosts.iter().find(is_there).unwrap_or(&hosts[0]).clone()
}

/// Sessions with defaults on that engine, or why there are none.
pub(crate) async fn connect() -> Result<DockerBackend, String> {
    connect_to(DockerOptions::default()).await
}

/// The same with these options, but for the engine.
pub(crate) async fn connect_to(options: DockerOptions) -> Result<DockerBackend, String> {
    let options = DockerOptions { host: host(), ..options };
    DockerBackend::connect(options, &|_| {}).await.map_err(|error| error.to_string())
}

/// The engine's own API, to look at it from outside.
pub(crate) fn api(host: &DockerHost) -> Docker {
    let made = match host.socket() {
        Some(path) => Docker::connect_with_unix(path.to_str().unwrap(), 60, API_DEFAULT_VERSION),
        None => Docker::connect_with_http(&host.address, 60, API_DEFAULT_VERSION),
    };
    made.unwrap()
}
