//! Ways out of a Wasm session, by threat: whoever fears one finds it by the name of its file.
//!
//! Each test is an attempt, and what is asserted is what the attacker wants: a byte of bait, a changed file,
//! another's secret, the host's memory or time, a neighbour that stops answering, a terminal that obeys. What is
//! here is what can be tried from within, or by who has a place beside the session: a mount, a snapshot, the
//! store. `README.md` has the table of threats, and says what is out of scope.

#[path = "escape/bait.rs"]
mod bait;
mod common;
#[path = "escape/environment.rs"]
mod environment;
#[path = "escape/files.rs"]
mod files;
#[path = "escape/host_time.rs"]
mod host_time;
#[path = "escape/images.rs"]
mod images;
#[path = "escape/modules.rs"]
mod modules;
#[path = "escape/network.rs"]
mod network;
#[path = "escape/objects.rs"]
mod objects;
#[path = "common/parts.rs"]
mod parts;
#[path = "escape/races.rs"]
mod races;
#[path = "escape/sources.rs"]
mod sources;
#[path = "escape/tenants.rs"]
mod tenants;
#[path = "escape/terminal.rs"]
mod terminal;
