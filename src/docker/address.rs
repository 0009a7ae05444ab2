//! Where an engine is: reading addresses, and the places where one may be.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where engines listen that belong to the system.
const SYSTEM_SOCKET: &str = "/var/run/docker.sock";
const PODMAN_SOCKET: &str = "/run/podman/podman.sock";
/// The files of a directory of certificates, by the names that Docker gives them.
pub(super) const CERTIFICATES: [&str; 3] = ["ca.pem", "cert.pem", "key.pem"];

/// The address of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerHost {
    /// `unix:///PATH` or `tcp://HOST:PORT`.
    pub address: String,
    /// The directory with `ca.pem`, `cert.pem` and `key.pem`, for TLS over TCP. Without it TCP is in the
    /// clear: whoever can speak to a Docker engine has its machine.
    pub certificates: Option<PathBuf>,
}

impl Default for DockerHost {
    fn default() -> Self {
        Self::unix(SYSTEM_SOCKET)
    }
}

/// An address, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place<'a> {
    Unix(&'a Path),
    Tcp { authority: &'a str, certificates: Option<&'a Path> },
}

impl DockerHost {
    fn unix(path: impl AsRef<Path>) -> Self {
        let address = format!("unix://{}", path.as_ref().display());
        Self { address, certificates: None }
    }

    /// Where an engine may be, the likeliest first, as the values of the process's variables say:
    /// `DOCKER_HOST` alone when it's set, with `DOCKER_CERT_PATH` when `DOCKER_TLS_VERIFY` is; otherwise
    /// the system's Docker, a rootless one, Docker Desktop, and Podman, rootless and of the system.
    ///
    /// ```
    /// use kaa::docker::DockerHost;
    ///
    /// let hosts = DockerHost::candidates(|name| match name {
    ///     "XDG_RUNTIME_DIR" => Some("/run/user/1000".into()),
    ///     _ => None,
    /// });
    /// assert_eq!(hosts[0].address, "unix:///var/run/docker.sock");
    /// assert_eq!(hosts[1].address, "unix:///run/user/1000/docker.sock");
    /// ```
    #[must_use]
    pub fn candidates(variable: impl Fn(&str) -> Option<String>) -> Vec<Self> {
        let value = |name: &str| variable(name).filter(|value| !value.is_empty());
        if let Some(address) = value("DOCKER_HOST") {
            let is_verified = value("DOCKER_TLS_VERIFY").is_some() && !address.starts_with("unix:");
            let directory = || {
                let home = || value("HOME").map(|home| format!("{home}/.docker"));
                value("DOCKER_CERT_PATH").or_else(home).map(PathBuf::from)
            };
            let certificates = is_verified.then(directory).flatten();
            return vec![Self { address, certificates }];
        }
        let runtime = value("XDG_RUNTIME_DIR");
        let in_runtime = |path: &str| runtime.as_ref().map(|dir| format!("{dir}/{path}"));
        let sockets = [
            Some(SYSTEM_SOCKET.to_owned()),
            in_runtime("docker.sock"),
            value("HOME").map(|home| format!("{home}/.docker/run/docker.sock")),
            in_runtime("podman/podman.sock"),
            Some(PODMAN_SOCKET.to_owned()),
        ];
        sockets.into_iter().flatten().map(Self::unix).collect()
    }

    /// The socket's file, if the engine is reached over one.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self.place() {
            Ok(Place::Unix(path)) => Some(path),
            _ => None,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        self.place().map(|_| ())
    }

    pub(super) fn place(&self) -> Result<Place<'_>> {
        let refuse =
            |reason: &str| Err(Error::invalid(format!("docker.host `{}`", self.address), reason));
        let Some((scheme, rest)) = self.address.split_once("://") else {
            return refuse("write it as unix:///PATH or tcp://HOST:PORT");
        };
        match scheme {
            "unix" if self.certificates.is_some() => {
                refuse("a socket needs no certificates; leave them out, or name a tcp:// address")
            }
            "unix" if !rest.starts_with('/') => refuse("the path must be absolute: unix:///PATH"),
            "unix" => Ok(Place::Unix(Path::new(rest))),
            "tcp" => {
                let authority = rest.trim_end_matches('/');
                let port = authority.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
                if authority.starts_with(':') || authority.contains('/') || port.is_none() {
                    return refuse("write it as tcp://HOST:PORT; the port is 2376 with TLS");
                }
                if !matches!(port, Some(Ok(1..))) {
                    return refuse("the port must be a number between 1 and 65535");
                }
                Ok(Place::Tcp { authority, certificates: self.certificates.as_deref() })
            }
            "ssh" => refuse(
                "SSH isn't spoken here; forward the socket, as in `ssh -NL \
                 /tmp/docker.sock:/var/run/docker.sock HOST`, and name unix:///tmp/docker.sock",
            ),
            _ => refuse("only unix:// and tcp:// are known"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_or_refused_with_what_would_be_right() {
        let host = |address: &str| DockerHost { address: address.into(), certificates: None };
        let path = Path::new("/run/d.sock");
        assert_eq!(host("unix:///run/d.sock").place().unwrap(), Place::Unix(path));
        assert_eq!(host("unix:///run/d.sock").socket(), Some(path));
        for authority in ["127.0.0.1:2375", "[::1]:2375", "engine.example:2376"] {
            let certificates = Some(Path::new("/certs"));
            let host = DockerHost {
                address: format!("tcp://{authority}/"),
                certificates: certificates.map(Path::to_owned),
            };
            assert_eq!(host.place().unwrap(), Place::Tcp { authority, certificates });
            assert_eq!(host.socket(), None);
        }
        for (address, part) in [
            ("/run/d.sock", "unix:///PATH"),
            ("unix://run/d.sock", "absolute"),
            ("tcp://engine", "2376"),
            ("tcp://:2375", "tcp://HOST:PORT"),
            ("tcp://engine:2375/v1", "tcp://HOST:PORT"),
            ("tcp://engine:0", "between 1"),
            ("tcp://engine:99999", "between 1"),
            ("ssh://me@engine", "ssh -NL"),
            ("npipe:////./pipe/docker_engine", "only unix"),
            ("", "unix:///PATH"),
        ] {
            let error = host(address).validate().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(address), "{address}: {error}");
        }
        let both = DockerHost { certificates: Some("/certs".into()), ..DockerHost::default() };
        assert!(both.validate().unwrap_err().to_string().contains("no certificates"));
    }

    #[test]
    fn candidates_follow_the_variables() {
        let of = |set: &[(&str, &str)]| -> Vec<(String, Option<PathBuf>)> {
            let find = |name: &str| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            };
            let hosts = DockerHost::candidates(find);
            hosts.into_iter().map(|host| (host.address, host.certificates)).collect()
        };
        let plain = |addresses: &[&str]| -> Vec<(String, Option<PathBuf>)> {
            addresses.iter().map(|address| ((*address).to_owned(), None)).collect()
        };
        let system = ["unix:///var/run/docker.sock", "unix:///run/podman/podman.sock"];
        assert_eq!(of(&[]), plain(&system));
        assert_eq!(of(&[("DOCKER_HOST", "")]), plain(&system));
        assert_eq!(
            of(&[("HOME", "/home/me"), ("XDG_RUNTIME_DIR", "/run/user/7")]),
            plain(&[
                system[0],
                "unix:///run/user/7/docker.sock",
                "unix:///home/me/.docker/run/docker.sock",
                "unix:///run/user/7/podman/podman.sock",
                system[1],
            ])
        );
        let tcp = ("DOCKER_HOST", "tcp://engine:2376");
        assert_eq!(of(&[tcp, ("HOME", "/home/me")]), plain(&["tcp://engine:2376"]));
        let with = |directory: &str| vec![(tcp.1.to_owned(), Some(PathBuf::from(directory)))];
        let verify = ("DOCKER_TLS_VERIFY", "1");
        assert_eq!(of(&[tcp, verify, ("HOME", "/home/me")]), with("/home/me/.docker"));
        assert_eq!(of(&[tcp, verify, ("DOCKER_CERT_PATH", "/certs")]), with("/certs"));
        let socket = ("DOCKER_HOST", "unix:///run/d.sock");
        assert_eq!(of(&[socket, verify, ("HOME", "/h")]), plain(&["unix:///run/d.sock"]));
    }
}
