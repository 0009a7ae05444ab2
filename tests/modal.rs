//! Sessions in Modal's sandboxes, over a stand-in of Modal: what breaks on the way, and what is left.

#[path = "modal/carrier.rs"]
mod carrier;
#[path = "common/modal.rs"]
mod cloud;
#[path = "modal/control.rs"]
mod control;
#[path = "modal/endings.rs"]
mod endings;
#[path = "modal/faults.rs"]
mod faults;
#[path = "modal/leaks.rs"]
mod leaks;
#[path = "modal/sandboxes.rs"]
mod sandboxes;
#[path = "modal/sessions.rs"]
mod sessions;
#[path = "modal/streams.rs"]
mod streams;

use std::time::{Duration, Instant};

use cloud::{StandIn, StandInOptions};
use kaa::modal::{ModalBackend, ModalClient, ModalConfig, ModalOptions};
use kaa::{Backend, Environment, EnvironmentOptions};

/// As whom a stand-in is asked.
pub(crate) fn config(stand_in: &StandIn) -> ModalConfig {
    stand_in.config()
}

pub(crate) async fn stand_in() -> StandIn {
    StandIn::start(StandInOptions::default()).await
}

pub(crate) async fn backend(stand_in: &StandIn) -> ModalBackend {
    let options = ModalOptions::default();
    ModalBackend::connect(config(stand_in), options, &|_| {}).await.expect("a backend")
}

pub(crate) async fn client(stand_in: &StandIn) -> ModalClient {
    ModalClient::connect(config(stand_in)).await.expect("a client")
}

pub(crate) async fn session(stand_in: &StandIn) -> Box<dyn Environment> {
    backend(stand_in).await.open(EnvironmentOptions::default()).await.expect("a session")
}

/// How many sandboxes run.
pub(crate) fn running(stand_in: &StandIn) -> usize {
    stand_in.sandboxes().iter().filter(|sandbox| sandbox.is_running).count()
}

/// Waits until no sandbox runs any more.
pub(crate) async fn all_ended(stand_in: &StandIn) {
    let since = Instant::now();
    while running(stand_in) > 0 {
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", stand_in.sandboxes());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
