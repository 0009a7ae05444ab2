//! What the guest may reach. Pure data; nothing is reachable by default.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// A host directory that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The directory on the host. Symbolic links in it can't lead out of it; pipes and devices in it can't be
    /// opened in Wasm.
    pub host: PathBuf,
    /// The absolute path at which the guest sees it: in Wasm none below `/tmp` and `/usr/local/lib`, which are
    /// the session's own.
    pub guest: String,
    /// Whether the guest may write; what it writes counts into `Limits::disk_bytes`.
    pub writable: bool,
}

/// Guest paths that are taken by the environment itself.
const RESERVED_GUEST_PATHS: &[&str] = &["/", "/tmp", "/usr/local/lib"];

impl Mount {
    /// Reads `HOST:GUEST[:rw]`, the form of the command line.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the text has another form.
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = |reason: &str| Error::invalid(format!("mount `{text}`"), reason);
        let (rest, writable) = match text.strip_suffix(":rw") {
            Some(rest) => (rest, true),
            None => (text.strip_suffix(":ro").unwrap_or(text), false),
        };
        let (host, guest) = rest
            .rsplit_once(':')
            .ok_or_else(|| invalid("write it as HOST:GUEST or HOST:GUEST:rw"))?;
        if host.is_empty() {
            return Err(invalid("the host path is empty"));
        }
        let mount = Self { host: host.into(), guest: guest.into(), writable };
        mount.validate()?;
        Ok(mount)
    }

    fn validate(&self) -> Result<()> {
        let invalid = |reason: &str| Error::invalid(format!("mount at `{}`", self.guest), reason);
        if !self.guest.starts_with('/') {
            return Err(invalid("the guest path must be absolute"));
        }
        if self.guest.contains('\0') || self.guest.split('/').any(|part| part == "..") {
            return Err(invalid("the guest path must not have `..` or NUL in it"));
        }
        let plain = self.guest.trim_end_matches('/');
        if RESERVED_GUEST_PATHS.contains(&plain) || plain.is_empty() {
            return Err(invalid("this guest path belongs to the environment; choose another"));
        }
        Ok(())
    }
}

/// What the guest's clocks show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// The host's clocks.
    #[default]
    Real,
    /// A clock of the session's own, for reproducible runs. It starts at this many nanoseconds
    /// since 1970 and moves by one microsecond per reading and by the length of each sleep, which
    /// returns at once.
    Fixed(u64),
}

/// What the guest may reach beyond its own memory. The default is nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Host directories. Default: none.
    pub mounts: Vec<Mount>,
    /// Environment variables that the guest sees. Default: none but the interpreter's own.
    pub env: Vec<(String, String)>,
    /// The guest's clocks. Default: the host's.
    pub clock: Clock,
    /// Seed of everything random in the session: `random`, numpy, `os.urandom`, `uuid4`.
    /// Default: none, the host's randomness. With a seed and a fixed clock a session is
    /// reproducible to the byte and to the unit of fuel.
    pub seed: Option<u64>,
    /// Modules that cells may import; others raise `ImportError`. This guides a model, it isn't a
    /// wall. Default: what the profile says (`rlm`: everything).
    pub allowed_imports: Option<Vec<String>>,
}

impl Policy {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names what is wrong: a guest path that is relative, reserved or used
    /// twice, or an environment variable with `=` or NUL in its name.
    pub fn validate(&self) -> Result<()> {
        for (at, mount) in self.mounts.iter().enumerate() {
            mount.validate()?;
            if self.mounts[..at].iter().any(|other| other.guest == mount.guest) {
                return Err(Error::invalid(
                    format!("mount at `{}`", mount.guest),
                    "two mounts have this guest path",
                ));
            }
        }
        for (name, value) in &self.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(Error::invalid(
                    format!("environment variable `{name}`"),
                    "the name must not be empty or have `=` in it, and neither part a NUL",
                ));
            }
        }
        Ok(())
    }
}
