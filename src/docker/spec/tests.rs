//! The walls, as the engine is told of them.

use std::fs;

use super::*;
use crate::limits::Limits;
use crate::policy::Policy;

fn facts() -> ImageFacts {
    ImageFacts { id: "sha256:12".into(), volumes: vec!["/var/lib/db".into(), "/tmp".into()] }
}

fn body(options: &DockerOptions, session: &EnvironmentOptions) -> ContainerCreateBody {
    let image = facts();
    let plan = Plan { options, image: &image, owner: "b/1/2", session: "ab" };
    plan.body(&["-I", "-c", "pass"], session).unwrap()
}

#[test]
fn the_defaults_are_the_safe_ones() {
    let body = body(&DockerOptions::default(), &EnvironmentOptions::default());
    assert_eq!(body.image.as_deref(), Some("sha256:12"));
    assert_eq!(body.user.as_deref(), Some("65534:65534"));
    assert_eq!(body.entrypoint, Some(vec!["python3".to_owned()]));
    assert_eq!(body.cmd, Some(["-I", "-c", "pass"].map(str::to_owned).to_vec()));
    assert_eq!((body.open_stdin, body.stdin_once, body.tty), (Some(true), Some(true), None));
    assert_eq!((body.network_disabled, body.exposed_ports), (Some(true), None));
    let labels = body.labels.unwrap();
    assert_eq!((&*labels[OWNER_LABEL], &*labels[SESSION_LABEL]), ("b/1/2", "ab"));
    assert_eq!(
        body.env.unwrap(),
        ["HOME=/tmp", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1", "TMPDIR=/tmp"]
    );
    let host = body.host_config.unwrap();
    assert_eq!(host.network_mode.as_deref(), Some("none"));
    assert_eq!((host.readonly_rootfs, host.privileged), (Some(true), None));
    assert_eq!((host.cap_drop, host.cap_add), (Some(vec!["ALL".to_owned()]), None));
    assert_eq!(host.security_opt, Some(vec!["no-new-privileges".to_owned()]));
    assert_eq!((host.port_bindings, host.publish_all_ports), (None, None));
    assert_eq!((host.binds, host.devices, host.pid_mode), (None, None, None));
    let memory = (1 << 30) + (64 << 20) + (8 << 20) + (64 << 20);
    assert_eq!((host.memory, host.memory_swap), (Some(memory), Some(memory)));
    assert_eq!((host.nano_cpus, host.pids_limit), (Some(1_000_000_000), Some(128)));
    assert_eq!(host.auto_remove, Some(true));
    let scratch = &host.tmpfs.unwrap()["/tmp"];
    assert_eq!(scratch, "rw,exec,nosuid,nodev,mode=1777,size=67108864");
    // What the image calls a volume is empty and closed, but for scratch, which is ours.
    let [cover] = host.mounts.unwrap().try_into().unwrap();
    assert_eq!(cover.target.as_deref(), Some("/var/lib/db"));
    assert_eq!((cover.typ, cover.read_only), (Some(MountType::TMPFS), Some(true)));
}

#[test]
fn what_is_asked_for_is_passed_on_and_numbers_never_overflow() {
    let docker = DockerOptions {
        network: Network::Named("lab".into()),
        runtime: Some("runsc".into()),
        cpus: 0.25,
        pids: 20,
        user: "1000:1000".into(),
        ..DockerOptions::default()
    };
    let env = [("A", "1=2"), ("LANG", "C")].map(|(name, value)| (name.into(), value.into()));
    let policy = Policy { env: env.to_vec(), ..Policy::default() };
    let limits = Limits { disk_bytes: u64::MAX, ..Limits::default() };
    let session = EnvironmentOptions { policy, limits, ..EnvironmentOptions::default() };
    let body = body(&docker, &session);
    let variables = body.env.unwrap();
    assert!(variables.contains(&"A=1=2".to_owned()) && variables.contains(&"LANG=C".to_owned()));
    assert_eq!(variables.len(), 5);
    assert_eq!(body.network_disabled, Some(false));
    let host = body.host_config.unwrap();
    assert_eq!(host.network_mode.as_deref(), Some("lab"));
    assert_eq!(host.runtime.as_deref(), Some("runsc"));
    assert_eq!((host.nano_cpus, host.pids_limit), (Some(250_000_000), Some(20)));
    assert_eq!(host.memory, Some(i64::MAX));

    let limits = Limits { disk_bytes: 0, ..Limits::default() };
    let none = EnvironmentOptions { limits, ..EnvironmentOptions::default() };
    let host = self::body(&docker, &none).host_config.unwrap();
    assert!(host.tmpfs.unwrap()["/tmp"].ends_with("size=4096"), "0 would be no limit");
}

#[test]
fn mounts_are_directories_that_exist_and_have_no_engine_in_them() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().canonicalize().unwrap();
    let (data, socket) = (root.join("data"), root.join("run/d.sock"));
    fs::create_dir(&data).unwrap();
    fs::create_dir(root.join("run")).unwrap();
    fs::write(&socket, "").unwrap();
    std::os::unix::fs::symlink(root.join("run"), root.join("link")).unwrap();
    let local = DockerHost { address: format!("unix://{}", socket.display()), certificates: None };
    let remote = DockerHost { address: "tcp://engine:2375".into(), certificates: None };
    let mount = |host: &Path, guest: &str, writable| Mount {
        host: host.to_owned(),
        guest: guest.into(),
        writable,
    };
    let read = bind(&mount(&data, "/data", false), &local).unwrap();
    assert_eq!((read.source.as_deref(), read.read_only), (data.to_str(), Some(true)));
    assert_eq!(read.bind_options.unwrap().non_recursive, Some(true));
    let written = bind(&mount(&data, "/data", true), &local).unwrap();
    assert_eq!(written.read_only, Some(false));
    bind(&mount(Path::new("/only/there"), "/data", false), &remote).unwrap();
    for (host, guest, engine, part) in [
        (root.join("none"), "/data", &local, "No such file"),
        (socket.clone(), "/data", &local, "no directory"),
        (root.clone(), "/data", &local, "engine's own socket"),
        (root.join("run"), "/data", &local, "engine's own socket"),
        (root.join("link"), "/data", &local, "engine's own socket"),
        (data.clone(), "/proc/1", &local, "belongs to the system"),
        ("data".into(), "/data", &remote, "must be absolute"),
    ] {
        let error = bind(&mount(&host, guest, false), engine).unwrap_err().to_string();
        assert!(error.contains(part), "{host:?}: {error}");
    }
}

#[test]
fn one_file_is_bounded_where_scratch_is_not_all() {
    let options = EnvironmentOptions::default();
    let closed = surroundings(&options);
    assert_eq!((closed.scratch.as_str(), closed.is_alone), ("/tmp", true));
    assert_eq!((closed.data_bytes, closed.file_bytes), (Some(1 << 30), None));
    let mount = Mount { host: "/data".into(), guest: "/data".into(), writable: true };
    let policy = Policy { mounts: vec![mount], ..Policy::default() };
    let open = surroundings(&EnvironmentOptions { policy, ..EnvironmentOptions::default() });
    assert_eq!(open.file_bytes, Some(64 << 20));
}
