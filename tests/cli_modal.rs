//! The command line over a stand-in of Modal: what runs there, what is left of it, and what is said.
//!
//! The failures guarded against: a sandbox that outlives its command and is paid for, a flag that doesn't
//! arrive, somebody else's sandbox that is ended, a token that is shown.

#[cfg(feature = "benchmark")]
#[path = "cli_modal/bench.rs"]
mod bench;
#[path = "common/modal.rs"]
mod cloud;
#[path = "cli_modal/doctor.rs"]
mod doctor;
#[path = "cli_modal/errors.rs"]
mod errors;
#[path = "cli_modal/leftovers.rs"]
mod leftovers;
#[path = "common/program.rs"]
mod program;
#[path = "cli_modal/run.rs"]
mod run;

use std::time::{Duration, Instant};

use cloud::{SandboxState, StandIn, StandInOptions};
use program::Place;

const TOKEN: &str = "ak-public-half";
const SECRET: &str = "as-hunter2";
/// How long anything may take that a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stand-in, and a place whose user has its token.
struct Cloud {
    stand_in: StandIn,
    place: Place,
}

impl Cloud {
    fn new() -> Self {
        Self::with(StandInOptions::default())
    }

    fn with(options: StandInOptions) -> Self {
        let (token_id, token_secret) = (TOKEN.to_owned(), SECRET.to_owned());
        let options = StandInOptions { token_id, token_secret, ..options };
        let stand_in = StandIn::start_blocking(options);
        let mut place = Place::new("--backend modal");
        place.set("MODAL_SERVER_URL", stand_in.url());
        place.set("KAA_MODAL_ROOTS", stand_in.root_certificate().to_str().unwrap());
        place.set("MODAL_TOKEN_ID", TOKEN);
        place.set("MODAL_TOKEN_SECRET", SECRET);
        place.hidden.push(SECRET.to_owned());
        Self { stand_in, place }
    }

    fn running(&self) -> Vec<SandboxState> {
        let mut sandboxes = self.stand_in.sandboxes();
        sandboxes.retain(|sandbox| sandbox.is_running);
        sandboxes
    }

    /// How many sandboxes there ever were; none of them runs any more.
    fn all_ended(&self, after: &str) -> usize {
        let running: Vec<_> = self.running().into_iter().map(|sandbox| sandbox.tags).collect();
        assert!(running.is_empty(), "after {after}: {running:?} run");
        self.stand_in.sandboxes().len()
    }

    /// The sandbox of a session that the program has begun to use: it has an entrypoint and Python.
    fn begun(&self) -> SandboxState {
        wait_for("a session", || self.running().into_iter().find(|sandbox| sandbox.started == 2))
    }
}

/// The first thing that `look` finds.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(since.elapsed() < PATIENCE, "there is no {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
