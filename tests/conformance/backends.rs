//! What the suite runs over, and why it isn't here if it isn't.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use kaa::conformance::Case;
use kaa::docker::{DockerOptions, Pull};
use kaa::modal::{Carrier, ModalBackend, ModalConfig, ModalImage, ModalOptions};
use kaa::{
    Backend, Capabilities, Environment, EnvironmentOptions, LocalBackend, LocalOptions, Result,
    WasmBackend,
};

use tokio::runtime::Runtime;

use crate::cloud::{StandIn, StandInOptions, packages};
use crate::{common, lab};

/// What a machine has, or why it doesn't.
pub(crate) type Found<T> = &'static Result<T, String>;
type Shared = Arc<dyn Backend>;

/// A backend of the suite.
pub(crate) struct Row {
    /// Of its tests, and for `KAA_REQUIRE`.
    pub(crate) name: &'static str,
    /// Cases at once.
    pub(crate) most: usize,
    pub(crate) find: fn() -> Found<Shared>,
    /// Which cases are run over it: all, unless another row has the rest.
    pub(crate) has: fn(&Case) -> bool,
}

pub(crate) const ALL: &[Row] = &[
    Row { name: "wasm", most: 4, find: wasm, has: |_| true },
    Row { name: "local", most: 4, find: local, has: |_| true },
    Row { name: "local_dill", most: 4, find: local_dill, has: |case| case.needs("snapshot") },
    Row { name: "docker", most: 2, find: docker, has: |_| true },
    Row { name: "docker_dill", most: 2, find: docker_dill, has: |case| case.needs("snapshot") },
    Row { name: "modal", most: 2, find: modal, has: |_| true },
    Row { name: "modal_dill", most: 2, find: modal_dill, has: |case| case.needs("snapshot") },
    Row { name: "modal_broker", most: 2, find: modal_broker, has: |_| true },
    Row { name: "modal_live", most: 4, find: modal_live, has: |_| true },
];

pub(crate) fn wasm() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let runtime = Arc::clone(common::runtime());
        Ok(Arc::new(WasmBackend::new(runtime, common::image("base"))))
    })
}

/// The host's CPython, if it's new enough for the language of the cases.
pub(crate) fn cpython() -> Found<PathBuf> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let script = "import sys; sys.exit(sys.version_info < (3, 11))";
        let mut command = Command::new("python3");
        match command.args(["-I", "-c", script]).stdin(Stdio::null()).status() {
            Ok(status) if status.success() => Ok(PathBuf::from("python3")),
            _ => Err("there is no `python3` of 3.11 or newer".into()),
        }
    })
}

fn host() -> Result<LocalBackend, String> {
    cpython().as_ref().map_err(Clone::clone)?;
    let path = std::env::var("PATH").map_err(|error| format!("PATH: {error}"))?;
    Ok(LocalBackend::new(LocalOptions { path, ..LocalOptions::default() }))
}

fn local() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| Ok(Arc::new(host()?)))
}

fn docker() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| Ok(Arc::new(executor().block_on(lab::connect())?)))
}

/// An image that has dill.
fn docker_dill() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let image = "kaa-test:dill".into();
        let options = DockerOptions { image, pull: Pull::Never, ..DockerOptions::default() };
        Ok(Arc::new(executor().block_on(lab::connect_to(options))?))
    })
}

/// Modal itself, on the account of whoever sets the variable.
fn modal_live() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        std::env::var("MODAL_TOKEN_ID").map_err(|_| "MODAL_TOKEN_ID isn't set")?;
        let config = ModalConfig::load(|name| std::env::var(name).ok());
        let config = config.map_err(|error| error.to_string())?;
        let image = ModalImage::default().pip_install(["dill"]);
        sandboxes(config, ModalOptions { image, ..ModalOptions::default() })
    })
}

/// A stand-in of Modal.
fn modal() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| stand_in_sandboxes(ModalOptions::default()))
}

/// Model calls take the second way.
fn modal_broker() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let carrier = Carrier::Broker { port: 8080 };
        stand_in_sandboxes(ModalOptions { carrier, ..ModalOptions::default() })
    })
}

fn modal_dill() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let image = ModalImage::default().pip_install(["dill"]);
        stand_in_sandboxes(ModalOptions { image, ..ModalOptions::default() })
    })
}

fn stand_in_sandboxes(options: ModalOptions) -> Result<Shared, String> {
    static STAND_IN: OnceLock<StandIn> = OnceLock::new();
    cpython().as_ref().map_err(Clone::clone)?;
    let start = || executor().block_on(StandIn::start(StandInOptions::default()));
    sandboxes(STAND_IN.get_or_init(start).config(), options)
}

fn sandboxes(config: ModalConfig, options: ModalOptions) -> Result<Shared, String> {
    let backend = executor().block_on(ModalBackend::connect(config, options, &|_| {}));
    Ok(Arc::new(backend.map_err(|error| error.to_string())?))
}

/// One for all: sessions and clients of engines leave work to it.
pub(crate) fn executor() -> &'static Runtime {
    static EXECUTOR: OnceLock<Runtime> = OnceLock::new();
    EXECUTOR.get_or_init(|| Runtime::new().expect("an executor"))
}

/// Local sessions that can import dill, and so be saved.
struct WithDill {
    host: LocalBackend,
    packages: String,
}

#[async_trait]
impl Backend for WithDill {
    fn capabilities(&self) -> Capabilities {
        self.host.capabilities()
    }

    async fn open(&self, mut options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        options.policy.env.push(("PYTHONPATH".into(), self.packages.clone()));
        self.host.open(options).await
    }
}

fn local_dill() -> Found<Shared> {
    static FOUND: OnceLock<Result<Shared, String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let packages = packages::installed("python3", packages::DILL)?;
        let packages = packages.to_str().ok_or("the target directory isn't UTF-8")?.to_owned();
        Ok(Arc::new(WithDill { host: host()?, packages }))
    })
}
