//! Sessions in containers, with a real engine: the walls, seen from inside; that nothing is ever left
//! behind; and every way in which an engine can fail a session.
//!
//! The failure guarded against: a wall that the options promise and the engine doesn't build, and a
//! container that outlives its host. What needs an engine is reported as ignored where there is none.

#[path = "docker/engines.rs"]
mod engines;
#[path = "docker/faults.rs"]
mod faults;
#[path = "common/docker.rs"]
mod lab;
#[path = "docker/remains.rs"]
mod remains;
#[path = "common/required.rs"]
mod required;
#[path = "docker/walls.rs"]
mod walls;

use std::future::Future;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bollard::Docker;
use kaa::docker::{DockerBackend, DockerHost, DockerOptions};
use kaa::{Backend, Environment, EnvironmentExt, EnvironmentOptions, Execution, Outcome};
use libtest_mimic::{Arguments, Trial};
use tokio::runtime::Runtime;

const SUITE: &str = "docker";

/// An engine that works.
struct Lab {
    host: DockerHost,
    api: Docker,
    /// Sessions with default options.
    backend: DockerBackend,
}

impl Lab {
    fn options(&self) -> DockerOptions {
        DockerOptions { host: self.host.clone(), ..DockerOptions::default() }
    }

    async fn connect(&self, options: DockerOptions) -> DockerBackend {
        DockerBackend::connect(options, &|_| {}).await.unwrap()
    }
}

fn lab() -> &'static Result<Lab, String> {
    static LAB: OnceLock<Result<Lab, String>> = OnceLock::new();
    LAB.get_or_init(|| {
        let backend = block_on(lab::connect())?;
        let host = lab::host();
        Ok(Lab { api: lab::api(&host), host, backend })
    })
}

/// One runtime for all: what sessions leave to it has to be done before anybody looks.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let build = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    RUNTIME.get_or_init(build).block_on(future)
}

type Session = Box<dyn Environment>;

async fn open(backend: &DockerBackend) -> Session {
    backend.open(EnvironmentOptions::default()).await.unwrap()
}

async fn run(session: &mut Session, code: &str) -> Execution {
    session.execute(code).await.unwrap_or_else(|error| panic!("{code}: {error}"))
}

/// What a cell prints; it must complete.
async fn print(session: &mut Session, code: &str) -> String {
    let execution = run(session, code).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{code}: {}", execution.stderr.text());
    execution.stdout.text().into_owned()
}

/// Asks again until `done`, or fails after `most`.
async fn until<F: Future<Output = bool>>(what: &str, most: Duration, done: impl Fn() -> F) {
    let deadline = Instant::now() + most;
    while !done().await {
        assert!(Instant::now() < deadline, "{what}: not within {most:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn main() -> ExitCode {
    if let Some(host) = std::env::var_os(remains::HOST_VARIABLE) {
        return remains::be_a_host(&host.into_string().unwrap());
    }
    let plain = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let need = lab;
    let lab = |name: &str, test: fn(&Lab)| {
        required::trial(SUITE, name, need, move |lab| {
            test(lab);
            Ok(())
        })
    };
    let trials = vec![
        lab("a_guest_is_nobody_and_can_write_only_scratch", walls::identity_and_files),
        lab("a_guest_has_no_network_but_models_answer", walls::network),
        lab("a_network_is_there_when_asked_for", walls::bridge),
        lab("processes_are_limited", walls::pids),
        lab("scratch_is_limited", walls::disk),
        lab("memory_is_limited", walls::memory),
        lab("sessions_do_not_see_each_other", walls::neighbours),
        lab("mounts_and_variables_are_as_given", walls::mounts),
        lab("an_images_own_habits_open_nothing", walls::odd_image),
        lab("gvisor_is_used_when_asked_for", walls::gvisor),
        lab("twenty_sessions_leave_nothing", remains::cycles),
        lab("dropped_sessions_leave_nothing", remains::drops),
        lab("a_killed_host_leaves_nothing", remains::killed_host),
        lab("leftovers_of_dead_hosts_are_removed_and_others_kept", remains::leftovers),
        lab("somebody_removes_the_container", faults::removed),
        lab("the_main_process_is_out_of_memory", faults::oom),
        lab("an_interpreter_that_is_none", faults::no_python),
        lab("an_image_that_cannot_be_had", faults::no_image),
        lab("an_image_is_pulled_with_progress", faults::pull),
        lab("what_the_engine_lacks_is_named", faults::lacking),
        plain("an_engine_that_is_missing", engines::missing),
        plain("an_engine_that_never_answers", engines::silent),
        plain("an_engine_that_is_too_old_or_none", engines::odd),
        lab("an_engine_that_is_killed_in_a_cell", engines::killed),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
