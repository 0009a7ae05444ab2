//! What a container is made of: the walls around the guest, in the words of the engine's API.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig,
    Mount as Bind, MountBindOptions, MountTmpfsOptions, MountType, ResourcesUlimits,
};

use super::address::DockerHost;
use super::engine::{ImageFacts, OWNER_LABEL};
use super::{DockerOptions, Network};
use crate::environment::EnvironmentOptions;
use crate::error::{Error, Result};
use crate::policy::Mount;
use crate::process::Surroundings;

/// The label with the session's number.
const SESSION_LABEL: &str = "kaa.session";
/// The guest's only writable directory.
const SCRATCH: &str = "/tmp";
/// What a container may have beside its worker's data: the supervisor, the interpreter's own files as
/// far as they are counted, the kernel's part.
const ALLOWANCE_BYTES: u64 = 64 << 20;
/// `/dev/shm`: enough for the locks of `multiprocessing`, and it counts as memory.
const SHM_BYTES: u64 = 8 << 20;
/// Open files. Some hosts don't give more than 20,000, and nobody needs the rest.
const FILES_MAX: i64 = 1024;
/// A tmpfs of size 0 has no limit at all.
const DISK_BYTES_MIN: u64 = 4096;
/// Where the kernel's own file systems are.
const SYSTEM_PATHS: [&str; 3] = ["/proc", "/sys", "/dev"];
/// What the guest's environment has beside the image's own.
const VARIABLES: [(&str, &str); 4] =
    [("HOME", SCRATCH), ("TMPDIR", SCRATCH), ("LANG", "C.UTF-8"), ("PYTHONDONTWRITEBYTECODE", "1")];

/// A container of one session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan<'a> {
    pub(super) options: &'a DockerOptions,
    pub(super) image: &'a ImageFacts,
    pub(super) owner: &'a str,
    pub(super) session: &'a str,
}

pub(super) fn surroundings(options: &EnvironmentOptions) -> Surroundings {
    // Scratch has a size of its own; what is written elsewhere is bounded file by file.
    let is_written = options.policy.mounts.iter().any(|mount| mount.writable);
    Surroundings {
        scratch: SCRATCH.into(),
        is_alone: true,
        data_bytes: Some(options.limits.memory_bytes),
        file_bytes: is_written.then_some(options.limits.disk_bytes),
        user: None,
        door: None,
    }
}

impl Plan<'_> {
    pub(super) fn body(
        self,
        arguments: &[&str],
        options: &EnvironmentOptions,
    ) -> Result<ContainerCreateBody> {
        let has_network = self.options.network != Network::None;
        let mut variables = BTreeMap::from(VARIABLES);
        for (name, value) in &options.policy.env {
            variables.insert(name, value);
        }
        let variables = variables.iter().map(|(name, value)| format!("{name}={value}"));
        let labels = [(OWNER_LABEL, self.owner), (SESSION_LABEL, self.session)];
        Ok(ContainerCreateBody {
            image: Some(self.image.id.clone()),
            // Not as the command: an image may have an entry point of its own.
            entrypoint: Some(vec![self.options.python.clone()]),
            cmd: Some(arguments.iter().map(|argument| (*argument).to_owned()).collect()),
            user: Some(self.options.user.clone()),
            working_dir: Some(SCRATCH.into()),
            hostname: Some("kaa".into()),
            env: Some(variables.collect()),
            labels: Some(labels.map(|(name, value)| (name.into(), value.into())).into()),
            open_stdin: Some(true),
            // The end of the connection is the end of the input, and that the end of the supervisor.
            stdin_once: Some(true),
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            // The kernel's namespace with its loopback is there all the same; what it leaves out is the
            // engine's part, half of the time of a start.
            network_disabled: Some(!has_network),
            // Images may have a check that the engine would run inside, again and again.
            healthcheck: Some(HealthConfig {
                test: Some(vec!["NONE".into()]),
                ..HealthConfig::default()
            }),
            // An engine that shuts down shouldn't wait: nothing in there listens to SIGTERM.
            stop_signal: Some("SIGKILL".into()),
            host_config: Some(self.host_config(options)?),
            ..ContainerCreateBody::default()
        })
    }

    fn host_config(self, options: &EnvironmentOptions) -> Result<HostConfig> {
        let limits = &options.limits;
        let disk_bytes = limits.disk_bytes.max(DISK_BYTES_MIN);
        // Files in scratch are memory too.
        let memory_bytes = [limits.memory_bytes, disk_bytes, SHM_BYTES, ALLOWANCE_BYTES]
            .iter()
            .fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        let memory = Some(i64::try_from(memory_bytes).unwrap_or(i64::MAX));
        // Executable, as elsewhere: compiled packages may be put there, and a guest that can run code
        // gains nothing by it. Nothing in there can have the rights of another user.
        let scratch = format!("rw,exec,nosuid,nodev,mode=1777,size={disk_bytes}");
        let network = match &self.options.network {
            Network::None => "none",
            Network::Bridge => "bridge",
            Network::Named(name) => name,
        };
        let ulimit = |name: &str, most| ResourcesUlimits {
            name: Some(name.into()),
            soft: Some(most),
            hard: Some(most),
        };
        let mut mounts = mounts(&options.policy.mounts, &self.options.host)?;
        let is_free = |path: &&String| {
            **path != SCRATCH && mounts.iter().all(|mount| mount.target.as_ref() != Some(*path))
        };
        let covers: Vec<Bind> =
            self.image.volumes.iter().filter(is_free).map(|path| cover(path)).collect();
        mounts.extend(covers);
        Ok(HostConfig {
            network_mode: Some(network.into()),
            readonly_rootfs: Some(true),
            tmpfs: Some(HashMap::from([(SCRATCH.to_owned(), scratch)])),
            mounts: Some(mounts),
            cap_drop: Some(vec!["ALL".into()]),
            security_opt: Some(vec!["no-new-privileges".into()]),
            ipc_mode: Some("private".into()),
            cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
            memory,
            // The same: no swap beside it.
            memory_swap: memory,
            nano_cpus: Some((self.options.cpus * 1e9) as i64),
            pids_limit: Some(self.options.pids.into()),
            ulimits: Some(vec![ulimit("core", 0), ulimit("nofile", FILES_MAX)]),
            shm_size: Some(i64::try_from(SHM_BYTES).unwrap_or(i64::MAX)),
            log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: None }),
            auto_remove: Some(true),
            runtime: self.options.runtime.clone(),
            ..HostConfig::default()
        })
    }
}

/// An empty directory, which can't be written, in place of a volume.
fn cover(path: &str) -> Bind {
    Bind {
        target: Some(path.to_owned()),
        typ: Some(MountType::TMPFS),
        read_only: Some(true),
        tmpfs_options: Some(MountTmpfsOptions {
            size_bytes: Some(4096),
            ..MountTmpfsOptions::default()
        }),
        ..Bind::default()
    }
}

/// The mounts of a policy, in the engine's words.
pub(super) fn mounts(mounts: &[Mount], engine: &DockerHost) -> Result<Vec<Bind>> {
    mounts.iter().map(|mount| bind(mount, engine)).collect()
}

fn bind(mount: &Mount, engine: &DockerHost) -> Result<Bind> {
    let refuse = |reason: String| Error::invalid(format!("mount at `{}`", mount.guest), reason);
    if SYSTEM_PATHS.iter().any(|path| Path::new(&mount.guest).starts_with(path)) {
        return Err(refuse("this guest path belongs to the system; choose another".into()));
    }
    let host = match engine.socket() {
        // The directory is one of the engine's machine, of which nothing is known here.
        None if mount.host.is_absolute() => mount.host.clone(),
        None => {
            return Err(refuse("for an engine elsewhere the host path must be absolute".into()));
        }
        Some(socket) => {
            let shown = mount.host.display();
            let host = mount.host.canonicalize().map_err(|e| refuse(format!("{shown}: {e}")))?;
            if !host.is_dir() {
                return Err(refuse(format!("{shown} is no directory")));
            }
            if socket.canonicalize().is_ok_and(|socket| socket.starts_with(&host)) {
                return Err(refuse(format!(
                    "{shown} has the engine's own socket in it, and with that the guest would have \
                     the host; choose a directory below it"
                )));
            }
            host
        }
    };
    let Some(source) = host.to_str() else {
        return Err(refuse("the host path must be UTF-8".into()));
    };
    Ok(Bind {
        target: Some(mount.guest.clone()),
        source: Some(source.to_owned()),
        typ: Some(MountType::BIND),
        read_only: Some(!mount.writable),
        bind_options: Some(MountBindOptions {
            // Engines before 25 leave what is mounted below a read-only directory writable, so that it's
            // left out.
            non_recursive: Some(!mount.writable),
            ..MountBindOptions::default()
        }),
        ..Bind::default()
    })
}

#[cfg(test)]
mod tests;
