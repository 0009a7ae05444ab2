//! A stand-in of Modal: its control plane and its workers, with processes of this machine as sandboxes.
//!
//! It keeps to what Modal's official clients expect, which `tests/modal_official.rs` proves with those
//! clients. Dropping it ends everything: sandboxes, their processes, their directories. So does the end of
//! the process that has it, however that comes.

#![allow(dead_code, reason = "every user of this needs a part of it")]

#[path = "modal/control.rs"]
mod control;
#[path = "modal/exec.rs"]
mod exec;
#[path = "modal/gate.rs"]
mod gate;
#[path = "modal/images.rs"]
mod images;
#[path = "packages.rs"]
pub(crate) mod packages;
#[path = "modal/procs.rs"]
mod procs;
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
#[path = "modal/proto.rs"]
pub(crate) mod proto;
#[path = "modal/router.rs"]
mod router;
#[path = "modal/sandbox.rs"]
mod sandbox;
#[path = "modal/tunnel.rs"]
mod tunnel;
#[path = "modal/wire.rs"]
mod wire;
#[path = "modal/world.rs"]
mod world;

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use futures_util::stream;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::transport::Server;

pub(crate) use self::gate::{Fault, Recorded};
use self::procs::Procs;
pub(crate) use self::proto::client::generic_result::GenericStatus;
use self::proto::client::modal_client_server::ModalClientServer;
use self::proto::client::{GenericResult, Sandbox as Definition, SandboxTag};
use self::proto::task_command_router::task_command_router_server::TaskCommandRouterServer;
pub(crate) use self::world::StandInOptions;
use self::world::World;

/// What Modal's own clients take and send at most in one message.
const MESSAGE_BYTES_MAX: usize = 100 << 20;
/// Wide enough for a server that is far away.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;

/// Waits until the process that holds its stdin has gone, and ends what that one couldn't: it was killed,
/// or kept the stand-in until its end.
const GUARD: &str = r#"
read -r _
for _ in 1 2 3; do
    grep -lsa "$1" /proc/[0-9]*/environ | while IFS=/ read -r _ _ pid _; do kill -9 "$pid"; done
done
rm -rf -- "$2"
"#;

/// A server in Modal's place, with a runtime of its own.
pub(crate) struct StandIn {
    world: Arc<World>,
    /// Both are there until the end.
    runtime: Option<Runtime>,
    folder: Option<TempDir>,
    guard: Child,
}

/// A sandbox as it is now.
#[derive(Debug, Clone)]
pub(crate) struct SandboxState {
    pub(crate) id: String,
    pub(crate) tags: Vec<(String, String)>,
    pub(crate) is_running: bool,
    pub(crate) result: Option<GenericResult>,
    /// The processes that were started in it, by their clients and as its entrypoint.
    pub(crate) started: usize,
    /// The processes that it has.
    pub(crate) pids: Vec<i32>,
    /// What it was asked to be: processors, memory, timeout, network.
    pub(crate) definition: Definition,
    /// Its files.
    pub(crate) root: PathBuf,
}

impl StandIn {
    /// Starts one that listens on a port of its own.
    pub(crate) async fn start(options: StandInOptions) -> Self {
        Self::start_blocking(options)
    }

    /// The same, outside of a runtime.
    pub(crate) fn start_blocking(options: StandInOptions) -> Self {
        let folder = tempfile::Builder::new().prefix("kaa-stand-in-").tempdir().unwrap();
        // Guests that aren't root find their directories below it.
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).unwrap();
        let world = Arc::new(World::new(options, folder.path().to_owned()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .thread_name("stand-in")
            .enable_all()
            .build()
            .unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (address, connections) = {
            let _guard = runtime.enter();
            world.network.listen(listener).unwrap()
        };
        world.address.set(address).unwrap();
        let control = ModalClientServer::new(control::Control(world.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let router = TaskCommandRouterServer::new(router::Router(world.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let gated = world.clone();
        let server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .layer(tower::layer::layer_fn(move |inner| gate::Gate::new(inner, gated.clone())))
            .add_service(control)
            .add_service(router);
        let incoming = stream::unfold(connections, async |mut connections| {
            let connection = connections.recv().await?;
            Some((std::io::Result::Ok(connection), connections))
        });
        runtime.spawn(server.serve_with_incoming(Box::pin(incoming)));
        runtime.spawn(world.clone().watch_limits());
        let guard = guard(&world.run, folder.path());
        Self { world, runtime: Some(runtime), folder: Some(folder), guard }
    }

    /// What `MODAL_SERVER_URL` is set to.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.world.address.get().expect("it listens"))
    }

    /// Lets a fault hit a call of this RPC: the next one that no fault before it hits.
    pub(crate) fn fault(&self, rpc: &str, fault: Fault) {
        self.world.calls.add_fault(rpc, fault);
    }

    /// How many faults have hit nothing yet.
    pub(crate) fn faults_left(&self) -> usize {
        self.world.calls.faults_left()
    }

    /// The calls so far, with their messages, if they're recorded.
    pub(crate) fn log(&self) -> Vec<Recorded> {
        assert!(self.world.options.record, "calls are recorded when `record` is set");
        self.world.calls.log()
    }

    /// How often this RPC was called, refused calls and those that a fault hit included.
    pub(crate) fn calls(&self, rpc: &str) -> usize {
        self.world.calls.count(rpc)
    }

    /// How many connections were taken.
    pub(crate) fn connections(&self) -> usize {
        self.world.network.accepted()
    }

    /// The sandboxes, those that have ended included, oldest first.
    pub(crate) fn sandboxes(&self) -> Vec<SandboxState> {
        let processes = Procs::now();
        let sandboxes = self.world.sandboxes.lock().unwrap();
        let state = |sandbox: &Arc<sandbox::Sandbox>| SandboxState {
            id: sandbox.id.clone(),
            tags: sandbox
                .tags
                .lock()
                .unwrap()
                .iter()
                .map(|tag| (tag.tag_name.clone(), tag.tag_value.clone()))
                .collect(),
            is_running: sandbox.is_running(),
            result: sandbox.result(),
            started: sandbox.started(),
            pids: sandbox.processes(&processes).0,
            definition: sandbox.definition.clone(),
            root: sandbox.root.clone(),
        };
        sandboxes.values().map(state).collect()
    }

    /// Ends a sandbox as Modal does: it's evicted, out of memory, out of time, …
    pub(crate) fn end_sandbox(&self, id: &str, status: GenericStatus) {
        self.world.sandbox(id).expect("it's one of this stand-in's").end(status);
    }

    /// Makes a sandbox one that somebody else has made, with these tags.
    pub(crate) fn retag(&self, id: &str, tags: &[(&str, &str)]) {
        let tag = |&(name, value): &(&str, &str)| SandboxTag {
            tag_name: name.to_owned(),
            tag_value: value.to_owned(),
        };
        let sandbox = self.world.sandbox(id).expect("it's one of this stand-in's");
        *sandbox.tags.lock().unwrap() = tags.iter().map(tag).collect();
    }

    /// Drops every connection, of tunnels too.
    pub(crate) fn cut_connections(&self) {
        self.world.network.cut();
    }

    /// Closes new connections before their first byte, as long as it's on.
    pub(crate) fn refuse_connections(&self, on: bool) {
        self.world.network.refuse(on);
    }

    /// No token that was given so far is taken any more.
    pub(crate) fn revoke_tokens(&self) {
        self.world.tokens.revoke();
    }

    /// The certificate that vouches for its tunnels, in PEM.
    pub(crate) fn root_certificate(&self) -> &Path {
        &self.world.authority.certificate
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.world.network.refuse(true);
        let sandboxes: Vec<_> = self.world.sandboxes.lock().unwrap().values().cloned().collect();
        for sandbox in sandboxes {
            sandbox.end(GenericStatus::Terminated);
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        drop(self.folder.take());
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn guard(run: &str, folder: &Path) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", GUARD, "sh", &format!("{}={run}-", procs::MARK)]).arg(folder);
    // Ctrl-C in a terminal is for the tests, not for who cleans up after them.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).spawn().unwrap()
}

impl StandIn {
    /// What a client of it is made with.
    pub(crate) fn config(&self) -> kaa::modal::ModalConfig {
        let options = &self.world.options;
        kaa::modal::ModalConfig {
            server_urls: vec![self.url()],
            token_id: options.token_id.clone(),
            token_secret: options.token_secret.clone(),
            environment: String::new(),
            image_builder_version: None,
            max_throttle_wait: None,
            root_certificates: Some(self.root_certificate().to_owned()),
        }
    }
}
