//! A sandbox of the stand-in: a directory, and processes of this machine.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::process::{Child, Command};
use tokio::sync::watch;
use tonic::Status;

use super::exec::{Exec, Exit, Wanted};
use super::images::Image;
use super::procs::{self, Procs};
use super::proto::client::generic_result::GenericStatus;
use super::proto::client::network_access::NetworkAccessType;
use super::proto::client::sandbox::OpenPortsOneof;
use super::proto::client::{GenericResult, PortSpec, SandboxTag, TunnelData};
use super::proto::client::{Sandbox as Definition, SandboxCreateV2Request};
use super::world::World;

/// Brings up loopback where `ip` is there, and becomes what comes after it.
const LOOPBACK: &str = r#"ip link set lo up 2>/dev/null; exec "$@""#;

/// Where sessions make their directories.
const SESSION_SCRATCH: &str = "/tmp/kaa-";

/// Whether this user may make networks.
pub(super) fn can_isolate() -> bool {
    let mut command = std::process::Command::new("unshare");
    let silent = command.args(["--net", "--", "true"]).stdout(Stdio::null()).stderr(Stdio::null());
    silent.status().is_ok_and(|status| status.success())
}

/// The network of a sandbox that runs. Held open: the system gives the name of one that is gone to the
/// next, whose processes would be taken for this one's.
struct OwnNetwork {
    name: PathBuf,
    _held: File,
}

pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) task_id: String,
    pub(crate) app_id: String,
    pub(crate) tags: Mutex<Vec<SandboxTag>>,
    pub(crate) definition: Definition,
    pub(crate) created_at: f64,
    pub(crate) image: Arc<Image>,
    /// What a guest sees as its own directory.
    pub(crate) root: PathBuf,
    /// What belongs to the stand-in.
    pub(crate) private: PathBuf,
    pub(crate) tunnels: Mutex<Vec<TunnelData>>,
    env: Vec<(String, String)>,
    mark: String,
    born: Instant,
    /// When the last process was seen running.
    busy: Mutex<Instant>,
    /// A process that does nothing but to have the sandbox's network.
    anchor: Option<Child>,
    network: Mutex<Option<OwnNetwork>>,
    result: watch::Sender<Option<GenericResult>>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    /// Directories that sessions make.
    scratch: Mutex<Vec<PathBuf>>,
    started: AtomicUsize,
}

impl Sandbox {
    /// Makes it, without starting anything in it.
    pub(crate) fn new(
        world: &World,
        request: &SandboxCreateV2Request,
        image: Arc<Image>,
        secrets: Vec<(String, String)>,
    ) -> Result<Self, Status> {
        let definition = request.definition.clone().unwrap_or_default();
        let id = world.id("sb", "");
        let task_id = world.id("ta", "V");
        let root = world.folder.join(&id);
        let private = world.folder.join(format!("{id}.private"));
        let copied = image.copy_to(&root).and_then(|()| std::fs::create_dir(&private));
        copied.map_err(|error| Status::internal(format!("no directory: {error}")))?;
        let mark = format!("{}-{id}", world.run);
        let mut sandbox = Self {
            env: environment(&root, &image, secrets),
            id,
            task_id,
            app_id: request.app_id.clone(),
            tags: Mutex::new(request.tags.clone()),
            definition,
            created_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64(),
            image,
            root,
            private,
            tunnels: Mutex::default(),
            mark,
            born: Instant::now(),
            busy: Mutex::new(Instant::now()),
            anchor: None,
            network: Mutex::default(),
            result: watch::Sender::new(None),
            execs: Mutex::default(),
            scratch: Mutex::default(),
            started: AtomicUsize::new(0),
        };
        if world.can_isolate && sandbox.network_type() != NetworkAccessType::Open {
            let error = |error| Status::internal(format!("no network: {error}"));
            sandbox.isolate().map_err(error)?;
        }
        Ok(sandbox)
    }

    /// Gives it a network of its own: with loopback, and without a way out.
    fn isolate(&mut self) -> std::io::Result<()> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "sh", "-c", LOOPBACK, "sh", "sleep", "infinity"]);
        command.env(procs::MARK, &self.mark).kill_on_drop(true);
        let anchor = command.stdin(Stdio::null()).process_group(0).spawn()?;
        let pid = i32::try_from(anchor.id().unwrap_or(0)).unwrap_or(0);
        let own = procs::network_of(0).or_else(|| std::fs::read_link("/proc/self/ns/net").ok());
        // The process has its network a moment after it was started.
        let deadline = Instant::now() + Duration::from_secs(10);
        while procs::network_of(pid).is_none_or(|network| Some(&network) == own.as_ref()) {
            if Instant::now() > deadline {
                return Err(std::io::Error::other("`unshare --net` made none"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let _held = File::open(format!("/proc/{pid}/ns/net"))?;
        let own = procs::network_of(pid).map(|name| OwnNetwork { name, _held });
        *self.network.lock().unwrap() = own;
        self.anchor = Some(anchor);
        Ok(())
    }

    pub(crate) fn anchor(&self) -> Option<u32> {
        self.anchor.as_ref().and_then(Child::id)
    }

    pub(crate) fn network_type(&self) -> NetworkAccessType {
        let access = self.definition.network_access.clone().unwrap_or_default();
        match access.network_access_type() {
            NetworkAccessType::Unspecified => NetworkAccessType::Open,
            known => known,
        }
    }

    pub(crate) fn ports(&self) -> Vec<PortSpec> {
        ports(&self.definition)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.result.borrow().is_none()
    }

    pub(crate) fn result(&self) -> Option<GenericResult> {
        self.result.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<GenericResult>> {
        self.result.subscribe()
    }

    pub(crate) fn started(&self) -> usize {
        self.started.load(Ordering::SeqCst)
    }

    pub(crate) fn is_late(&self) -> bool {
        let timeout = u64::from(self.definition.timeout_secs);
        timeout > 0 && self.born.elapsed() >= Duration::from_secs(timeout)
    }

    pub(crate) fn is_idle_too_long(&self) -> bool {
        let Some(timeout) = self.definition.idle_timeout_secs else { return false };
        let mut busy = self.busy.lock().unwrap();
        if self.execs.lock().unwrap().values().any(|exec| exec.poll().is_none()) {
            *busy = Instant::now();
        }
        busy.elapsed() >= Duration::from_secs(timeout.into())
    }

    /// In bytes; 0 is no limit.
    pub(crate) fn memory_max(&self) -> u64 {
        self.definition.resources.map_or(0, |resources| u64::from(resources.memory_mb_max) << 20)
    }

    /// Its processes, and the memory they have.
    pub(crate) fn processes(&self, all: &Procs) -> (Vec<i32>, u64) {
        let network = self.network.lock().unwrap();
        all.of(&self.mark, network.as_ref().map(|own| &own.name))
    }

    /// Ends it with what Modal says then, unless it has ended.
    pub(crate) fn end(&self, status: GenericStatus) {
        let exitcode = match status {
            GenericStatus::Success => 0,
            GenericStatus::Timeout => 124,
            _ => 137,
        };
        let exception = format!("the sandbox ended: {}", status.as_str_name());
        self.end_with(GenericResult { status: status.into(), exception, exitcode });
    }

    pub(crate) fn end_with(&self, result: GenericResult) {
        // Nothing is started any more once there is a result, see `start`.
        let execs = self.execs.lock().unwrap();
        let is_first = self.result.send_if_modified(|found| {
            let is_first = found.is_none();
            found.get_or_insert(result);
            is_first
        });
        drop(execs);
        if is_first {
            let network = self.network.lock().unwrap().take();
            procs::kill_all(&self.mark, network.as_ref().map(|own| &own.name));
            for folder in self.scratch.lock().unwrap().drain(..) {
                let _ = std::fs::remove_dir_all(folder);
            }
        }
    }

    pub(crate) fn exec(&self, id: &str) -> Result<Arc<Exec>, Status> {
        let execs = self.execs.lock().unwrap();
        execs.get(id).cloned().ok_or_else(|| Status::not_found(format!("Exec {id:?} not found")))
    }

    /// Starts a process, unless the one with this id was started.
    pub(crate) fn start(
        &self,
        exec_id: &str,
        arguments: &[String],
        workdir: Option<&str>,
        env: Vec<(String, String)>,
        wanted: &Wanted,
    ) -> Result<Arc<Exec>, Status> {
        let mut execs = self.execs.lock().unwrap();
        if let Some(exec) = execs.get(exec_id) {
            return Ok(exec.clone());
        }
        if !self.is_running() {
            return Err(Status::not_found(format!("Task {:?} has finished", self.task_id)));
        }
        let number = self.started.load(Ordering::SeqCst);
        let mut command = self.command(arguments, workdir, env)?;
        let exec = Exec::start(&mut command, wanted, &self.private, &number.to_string())
            .map_err(|error| cannot_start(arguments, &error.to_string()))?;
        self.started.fetch_add(1, Ordering::SeqCst);
        *self.busy.lock().unwrap() = Instant::now();
        let exec = Arc::new(exec);
        execs.insert(exec_id.to_owned(), exec.clone());
        Ok(exec)
    }

    fn command(
        &self,
        arguments: &[String],
        workdir: Option<&str>,
        env: Vec<(String, String)>,
    ) -> Result<Command, Status> {
        let (program, rest) =
            arguments.split_first().ok_or_else(|| Status::invalid_argument("no command_args"))?;
        let workdir = workdir.or(self.definition.workdir.as_deref());
        let folder = self.inside(workdir.unwrap_or(self.image.workdir.as_str()));
        std::fs::create_dir_all(&folder)
            .map_err(|error| Status::invalid_argument(format!("workdir: {error}")))?;
        let mut all: HashMap<String, String> = self.env.iter().cloned().collect();
        all.extend(env);
        // A sandbox's own `/tmp` would go with it; this one is the machine's.
        let scratch = all.get("TMPDIR").filter(|path| path.starts_with(SESSION_SCRATCH));
        self.scratch.lock().unwrap().extend(scratch.map(PathBuf::from));
        let path = all.get("PATH").cloned().unwrap_or_default();
        let program = found(program, &path, &folder)
            .ok_or_else(|| cannot_start(arguments, "executable file not found in $PATH"))?;
        let mut command = match self.anchor() {
            Some(anchor) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/proc/{anchor}/ns/net")).arg("--").arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(rest).current_dir(folder).env_clear().envs(all).env(procs::MARK, &self.mark);
        Ok(command)
    }

    /// A path of the guest's as one of this machine.
    fn inside(&self, path: &str) -> PathBuf {
        let path = Path::new(path);
        match path.starts_with(&self.root) {
            true => path.to_owned(),
            false => self.root.join(path.strip_prefix("/").unwrap_or(path)),
        }
    }

    /// Runs the entrypoint; the sandbox ends with it.
    pub(crate) fn start_entrypoint(self: &Arc<Self>) {
        let arguments = match self.definition.entrypoint_args.as_slice() {
            [] => return,
            arguments => arguments,
        };
        let wanted = Wanted { stdout: false, stderr: false, timeout: None };
        let exec = match self.start("entrypoint", arguments, None, Vec::new(), &wanted) {
            Ok(exec) => exec,
            Err(status) => {
                let exception = status.message().to_owned();
                let status = GenericStatus::InitFailure.into();
                return self.end_with(GenericResult { status, exception, exitcode: 1 });
            }
        };
        let sandbox = self.clone();
        tokio::spawn(async move {
            let (status, exitcode) = match exec.wait().await {
                Exit::Code(0) => (GenericStatus::Success, 0),
                Exit::Code(code) => (GenericStatus::Failure, code),
                Exit::Signal(signal) => (GenericStatus::Failure, 128 + signal),
            };
            let status = status.into();
            sandbox.end_with(GenericResult { status, exception: String::new(), exitcode });
        });
    }
}

fn cannot_start(arguments: &[String], reason: &str) -> Status {
    let program = arguments.first().map_or("", String::as_str);
    Status::invalid_argument(format!("{program:?} can't be started: {reason}"))
}

/// The ports that a definition opens.
pub(crate) fn ports(definition: &Definition) -> Vec<PortSpec> {
    match &definition.open_ports_oneof {
        Some(OpenPortsOneof::OpenPorts(ports)) => ports.ports.clone(),
        None => Vec::new(),
    }
}

fn environment(
    root: &Path,
    image: &Image,
    secrets: Vec<(String, String)>,
) -> Vec<(String, String)> {
    let home = root.display().to_string();
    let mut env = vec![
        ("PATH".to_owned(), std::env::var("PATH").unwrap_or_default()),
        ("HOME".to_owned(), home.clone()),
        ("TMPDIR".to_owned(), format!("{home}/tmp")),
    ];
    if let Some(packages) = image.python_path() {
        env.push(("PYTHONPATH".to_owned(), packages));
    }
    env.extend(image.env.iter().cloned());
    env.extend(secrets);
    env
}

/// The program that a shell would find.
fn found(program: &str, path: &str, folder: &Path) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(folder.join(program)).filter(|file| file.is_file());
    }
    std::env::split_paths(path).map(|entry| entry.join(program)).find(|file| file.is_file())
}
