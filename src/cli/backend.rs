//! The flags that say where cells run, and which of the others mean something there.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kaa::LocalOptions;

use super::Failure;
use super::docker::{DockerFlags, DockerPlan};
use super::flags::read_text;
use super::modal::{ModalFlags, ModalPlan};

/// A larger source is not one that anybody wrote.
const SETUP_BYTES_MAX: u64 = 64 << 20;

/// Where cells run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// WebAssembly, inside this process
    Wasm,
    /// A Python process of yours, which nothing isolates: for code that you trust
    Local,
    /// A container of a Docker engine
    Docker,
    /// A sandbox in Modal's cloud, at the cost of your account there
    Modal,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Wasm => "wasm",
            Self::Local => "local",
            Self::Docker => "docker",
            Self::Modal => "modal",
        }
    }
}

/// Where cells run, as typed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Backend")]
pub(super) struct BackendFlags {
    /// Where cells run
    #[arg(long, value_enum, default_value = "wasm")]
    backend: Kind,
    /// Interpreter of a session that isn't wasm's, 3.9 or newer: a path, or a name on the PATH
    /// [default: python3]
    #[arg(long, value_name = "PROGRAM")]
    python: Option<String>,
    /// File of Python that a session runs before anything else, if it isn't wasm's
    #[arg(long, value_name = "FILE")]
    setup_code: Option<PathBuf>,
    /// Processors that a container or a sandbox of Modal may use at a time, such as 0.5 or 2
    /// [default: 1]
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    #[command(flatten)]
    docker: DockerFlags,
    #[command(flatten)]
    modal: ModalFlags,
}

/// Where cells run, as it is meant.
#[derive(Debug)]
pub(super) enum Place {
    Wasm { image: String, wheel: Option<PathBuf> },
    Local(LocalOptions),
    Docker(DockerPlan),
    Modal(ModalPlan),
}

impl BackendFlags {
    pub(super) fn kind(&self) -> Kind {
        self.backend
    }

    /// Refuses flags that mean nothing on the backend, the given ones of a session among them.
    pub(super) fn check(&self, session: &[(&'static str, bool)]) -> Result<(), Failure> {
        let own = [
            ("--python", self.python.is_some()),
            ("--setup-code", self.setup_code.is_some()),
            ("--cpus", self.cpus.is_some()),
        ];
        let (docker, modal) = (self.docker.given(), self.modal.given());
        let all = own.iter().chain(session).chain(&docker).chain(&modal);
        for (flag, _) in all.filter(|(_, is_given)| *is_given) {
            if let Some(reason) = refusal(self.backend, flag) {
                let backend = self.backend.name();
                let reason = format!("the {backend} backend does not support it: {reason}");
                return Err(Failure::usage(flag, reason));
            }
        }
        Ok(())
    }

    /// What is meant. Reads the file of the setup code.
    pub(super) fn resolve(
        self,
        image: Option<String>,
        wheel: Option<PathBuf>,
    ) -> Result<Place, Failure> {
        let setup_code = self.setup_code.as_deref().map(setup_code).transpose()?;
        let (python, cpus) = (self.python, self.cpus);
        Ok(match self.backend {
            Kind::Wasm => Place::Wasm { image: image.unwrap_or_else(|| "base".into()), wheel },
            Kind::Local => Place::Local(local_options(python, setup_code)),
            Kind::Docker => Place::Docker(self.docker.resolve(python, setup_code, cpus)?),
            Kind::Modal => Place::Modal(self.modal.resolve(python, setup_code, cpus)?),
        })
    }
}

/// The interpreter of local sessions is the one that this user's shell would start.
pub(super) fn local_options(python: Option<String>, setup_code: Option<String>) -> LocalOptions {
    let defaults = LocalOptions::default();
    // A path begins here, not in the directory of the session.
    let python = python.map(|python| match python.contains('/') {
        true => std::path::absolute(&python).unwrap_or_else(|_| PathBuf::from(python)),
        false => PathBuf::from(python),
    });
    LocalOptions {
        python: python.unwrap_or(defaults.python),
        path: std::env::var("PATH").unwrap_or(defaults.path),
        setup_code,
    }
}

fn setup_code(path: &Path) -> Result<String, Failure> {
    read_text("--setup-code", path, SETUP_BYTES_MAX)
}

/// Why a flag means nothing on a backend, with what helps.
fn refusal(backend: Kind, flag: &str) -> Option<&'static str> {
    use Kind::{Docker, Local, Modal, Wasm};
    Some(match (flag, backend) {
        ("--fuel", Local | Docker | Modal) => {
            "only wasm counts fuel; --compute limits the processor time of a cell"
        }
        ("--seed" | "--fixed-clock", Local | Docker | Modal) => {
            "only wasm makes a session reproducible; leave it out, or take --backend wasm"
        }
        ("--image", Local) => {
            "images are wasm's; --python names the interpreter, --setup-code what it begins with"
        }
        ("--image", Docker) => {
            "images of `kaa image` are wasm's; --docker-image names the container's"
        }
        ("--image", Modal) => "images of `kaa image` are wasm's; --modal-image names the sandbox's",
        ("--wheel", Local | Docker | Modal) => "it is for setting up wasm; leave it out",
        ("--mount", Local) => {
            "nothing keeps cells from your files; they open them by their own paths. Take \
             --backend docker or wasm to give them a directory and no other"
        }
        ("--mount", Modal) => {
            "the files of this machine are not where the sandbox is; hand texts in with --context or \
             --var, and put files into the image"
        }
        ("--python", Wasm) => "its Python is part of the image; leave it out",
        ("--setup-code", Wasm) => {
            "an image is made with it, once: `kaa image build NAME --setup FILE`, and then --image NAME"
        }
        (flag, Wasm | Local | Modal) if flag.starts_with("--docker-") => {
            "it says how containers are made; add --backend docker, or leave it out"
        }
        (flag, Wasm | Local | Docker) if flag.starts_with("--modal-") => {
            "it says how sandboxes of Modal are made; add --backend modal, or leave it out"
        }
        ("--cpus", Wasm | Local) => {
            "it is a limit of containers and sandboxes; --compute limits the processor time of a cell"
        }
        ("--pids", Wasm) => "its sessions have no processes and no threads; leave it out",
        ("--pids", Local) => "it is a limit of containers; `ulimit -u` limits your processes",
        ("--pids", Modal) => "it is a limit of containers; Modal has none of this kind",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_refused_where_they_mean_nothing() {
        for (flag, refusers) in [
            ("--fuel", &[Kind::Local, Kind::Docker, Kind::Modal][..]),
            ("--seed", &[Kind::Local, Kind::Docker, Kind::Modal]),
            ("--fixed-clock", &[Kind::Local, Kind::Docker, Kind::Modal]),
            ("--image", &[Kind::Local, Kind::Docker, Kind::Modal]),
            ("--wheel", &[Kind::Local, Kind::Docker, Kind::Modal]),
            ("--mount", &[Kind::Local, Kind::Modal]),
            ("--python", &[Kind::Wasm]),
            ("--setup-code", &[Kind::Wasm]),
            ("--docker-image", &[Kind::Wasm, Kind::Local, Kind::Modal]),
            ("--modal-image", &[Kind::Wasm, Kind::Local, Kind::Docker]),
            ("--cpus", &[Kind::Wasm, Kind::Local]),
            ("--pids", &[Kind::Wasm, Kind::Local, Kind::Modal]),
        ] {
            for kind in Kind::value_variants() {
                assert_eq!(
                    refusal(*kind, flag).is_some(),
                    refusers.contains(kind),
                    "{flag} {kind:?}"
                );
            }
        }
    }
}
