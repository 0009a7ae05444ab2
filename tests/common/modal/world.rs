//! All that the stand-in knows: apps, images, sandboxes, tokens.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::RngExt;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::gate::Calls;
use super::images::{Image, LayerKey};
use super::procs::Procs;
use super::proto::client::generic_result::GenericStatus;
use super::sandbox::Sandbox;
use super::tunnel::Authority;
use super::wire::Network;

/// How often limits are looked at.
const TICK: Duration = Duration::from_millis(100);
const TICKS_PER_SCAN: u32 = 3;

/// How a stand-in behaves.
#[derive(Debug, Clone)]
pub(crate) struct StandInOptions {
    pub(crate) token_id: String,
    pub(crate) token_secret: String,
    /// What every exchange takes more, as if the server were far away.
    pub(crate) round_trip: Duration,
    /// Whether `TaskExecStdinWriteStream` is there.
    pub(crate) stdin_streams: bool,
    /// Whether calls are kept, see [`StandIn::log`](super::StandIn::log).
    pub(crate) record: bool,
    /// How long tokens are taken.
    pub(crate) token_life: Duration,
    /// The secrets that the account has.
    pub(crate) secrets: BTreeMap<String, BTreeMap<String, String>>,
    pub(crate) image_builder_version: String,
    /// Whether questions are held for as long as they say, until there is an answer.
    pub(crate) holds: bool,
    /// Whether the answer of a create tells where the sandbox's worker is.
    pub(crate) tells_router: bool,
}

impl Default for StandInOptions {
    fn default() -> Self {
        Self {
            token_id: "ak-standin".into(),
            token_secret: "as-standin".into(),
            round_trip: Duration::ZERO,
            stdin_streams: true,
            record: false,
            token_life: Duration::from_secs(20 * 60),
            secrets: BTreeMap::new(),
            image_builder_version: "2025.06".into(),
            holds: true,
            tells_router: true,
        }
    }
}

/// The tokens that were given out, with what they are for and their ends.
pub(crate) struct Tokens {
    life: Duration,
    given: Mutex<HashMap<String, (Option<String>, Instant)>>,
}

impl Tokens {
    /// A token for a task's worker, or for the control plane. Only its expiry can be read from it.
    pub(crate) fn give(&self, task: Option<&str>) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let claims = serde_json::json!({ "exp": (now + self.life).as_secs(), "task_id": task });
        let signature: [u8; 32] = rand::rng().random();
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let head = encode(br#"{"alg":"HS256","typ":"JWT"}"#);
        let token =
            format!("{head}.{}.{}", encode(claims.to_string().as_bytes()), encode(&signature));
        let end = Instant::now() + self.life;
        self.given.lock().unwrap().insert(token.clone(), (task.map(str::to_owned), end));
        token
    }

    /// What a token is for, if it's taken.
    pub(crate) fn check(&self, token: &str) -> Option<Option<String>> {
        let given = self.given.lock().unwrap();
        let (task, end) = given.get(token)?;
        (Instant::now() < *end).then(|| task.clone())
    }

    /// No token that was given so far is taken any more.
    pub(crate) fn revoke(&self) {
        self.given.lock().unwrap().clear();
    }
}

/// What creates made, by the keys that make them idempotent.
pub(crate) type Made = tokio::sync::Mutex<HashMap<String, String>>;

pub(crate) struct World {
    pub(crate) options: StandInOptions,
    pub(crate) folder: PathBuf,
    /// Tells the processes of this stand-in from those of others.
    pub(crate) run: String,
    pub(crate) address: OnceLock<std::net::SocketAddr>,
    pub(crate) authority: Authority,
    pub(crate) network: Arc<Network>,
    pub(crate) calls: Calls,
    pub(crate) tokens: Tokens,
    pub(crate) apps: Mutex<HashMap<(String, String), String>>,
    pub(crate) images: Mutex<HashMap<String, Arc<Image>>>,
    pub(crate) layers: Mutex<HashMap<LayerKey, String>>,
    pub(crate) sandboxes: Mutex<BTreeMap<String, Arc<Sandbox>>>,
    pub(crate) made: Made,
    pub(crate) can_isolate: bool,
    numbers: AtomicU64,
}

impl World {
    pub(crate) fn new(options: StandInOptions, folder: PathBuf) -> Self {
        let random: u64 = rand::rng().random();
        let network = Arc::new(Network::new(options.round_trip));
        let tokens = Tokens { life: options.token_life, given: Mutex::default() };
        Self {
            authority: Authority::new(&folder),
            options,
            folder,
            run: format!("{random:016x}"),
            address: OnceLock::new(),
            network,
            calls: Calls::default(),
            tokens,
            apps: Mutex::default(),
            images: Mutex::default(),
            layers: Mutex::default(),
            sandboxes: Mutex::default(),
            made: Made::default(),
            can_isolate: super::sandbox::can_isolate(),
            numbers: AtomicU64::new(1),
        }
    }

    /// An id that nothing of this stand-in has.
    pub(crate) fn id(&self, prefix: &str, suffix: &str) -> String {
        let number = self.numbers.fetch_add(1, Ordering::SeqCst);
        // Longer than the 22 characters of an id of version 1.
        format!("{prefix}-{number:08}{}{suffix}", self.run)
    }

    pub(crate) fn image(&self, id: &str) -> Result<Arc<Image>, Status> {
        let images = self.images.lock().unwrap();
        images.get(id).cloned().ok_or_else(|| Status::not_found(format!("Image {id:?} not found")))
    }

    pub(crate) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Status> {
        let sandboxes = self.sandboxes.lock().unwrap();
        let unknown = || Status::not_found(format!("Sandbox {id:?} not found"));
        sandboxes.get(id).cloned().ok_or_else(unknown)
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Sandbox>, Status> {
        let sandboxes = self.sandboxes.lock().unwrap();
        let found = sandboxes.values().find(|sandbox| sandbox.task_id == id);
        found.cloned().ok_or_else(|| Status::not_found(format!("Task {id:?} not found")))
    }

    /// The address of workers, with the scheme that this client wants of a server on loopback.
    pub(crate) fn router_url(&self, metadata: &MetadataMap) -> String {
        let text = |name| metadata.get(name).and_then(|value| value.to_str().ok());
        let is_plain = text("x-modal-client-type") == Some("1")
            || text("x-modal-libmodal-version").is_some_and(|name| name.starts_with("kaa-rs/"));
        let scheme = if is_plain { "http" } else { "https" };
        format!("{scheme}://{}", self.address.get().expect("the server listens"))
    }

    /// Holds sandboxes to their limits, as long as it's run.
    pub(crate) async fn watch_limits(self: Arc<Self>) {
        let mut ticks = 0;
        loop {
            tokio::time::sleep(TICK).await;
            ticks += 1;
            let all: Vec<Arc<Sandbox>> = self.sandboxes.lock().unwrap().values().cloned().collect();
            let running = all.into_iter().filter(|sandbox| sandbox.is_running());
            let (late, rest): (Vec<_>, Vec<_>) = running.partition(|sandbox| sandbox.is_late());
            for sandbox in late {
                sandbox.end(GenericStatus::Timeout);
            }
            for sandbox in rest.iter().filter(|sandbox| sandbox.is_idle_too_long()) {
                sandbox.end(GenericStatus::IdleTimeout);
            }
            let limited: Vec<_> =
                rest.into_iter().filter(|sandbox| sandbox.memory_max() > 0).collect();
            if ticks % TICKS_PER_SCAN != 0 || limited.is_empty() {
                continue;
            }
            let processes = Procs::now();
            for sandbox in limited {
                if sandbox.processes(&processes).1 > sandbox.memory_max() {
                    sandbox.end(GenericStatus::KernelOomKill);
                }
            }
        }
    }
}
