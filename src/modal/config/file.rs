//! The file of Modal's own clients, and which of its profiles counts.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Setting;
use crate::error::{Error, Result};

/// A file of profiles has some hundred bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The profile that counts where none is active.
const DEFAULT: &str = "default";

/// A profile of the file, if both are there.
#[derive(Debug)]
pub(super) struct Profile {
    /// `None` without a home directory.
    path: Option<PathBuf>,
    name: String,
    /// `None` without the file.
    file: Option<Table>,
}

impl Profile {
    /// The one that the variables name, or else the file itself.
    pub(super) fn find(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let home = || variable("HOME").map(|home| Path::new(&home).join(".modal.toml"));
        let path = variable("MODAL_CONFIG_PATH").map(PathBuf::from).or_else(home);
        let file = path.as_deref().map(read).transpose()?.flatten();
        let named = variable("MODAL_PROFILE");
        let active = match (&path, &file) {
            (Some(path), Some(file)) => active(path, file, named.is_some())?,
            _ => None,
        };
        let is_named = named.is_some();
        let name = named.or(active).unwrap_or_else(|| DEFAULT.to_owned());
        let profile = Self { path, name, file };
        if is_named && profile.table().is_none() {
            let reason = format!("{}; leave it out, or name another", profile.absence());
            return Err(Error::invalid("MODAL_PROFILE", reason));
        }
        Ok(profile)
    }

    /// The value of a key that is there and not empty. A number counts as its digits.
    pub(super) fn text(&self, key: &str) -> Result<Option<Setting>> {
        let Some(value) = self.table().and_then(|table| table.get(key)) else {
            return Ok(None);
        };
        let place = self.place(key);
        let value = match value {
            Value::String(text) => text.trim().to_owned(),
            Value::Integer(number) if key == "max_throttle_wait" => number.to_string(),
            other => {
                let kind = other.type_str();
                let reason = format!("it must be a text in quotes, and is of the type {kind}");
                return Err(Error::invalid(place, reason));
            }
        };
        Ok((!value.is_empty()).then_some(Setting { value, place }))
    }

    /// Where a key of it is or would be.
    pub(super) fn place(&self, key: &str) -> String {
        format!("{key} of {self}")
    }

    /// Why nothing was found in it.
    pub(super) fn absence(&self) -> String {
        let Self { path, name, file } = self;
        let path = match path {
            None => return "there is no home directory to look for .modal.toml in".to_owned(),
            Some(path) => path.display(),
        };
        match (file, self.table()) {
            (None, _) => format!("there is no file {path}"),
            (Some(_), Some(_)) => format!("the profile `{name}` of {path} has none"),
            (Some(file), None) => match names(file.keys()) {
                others if others.is_empty() => format!("{path} has no profiles"),
                others => format!(
                    "{path} has no profile `{name}`, but {others} (`modal profile activate` chooses one)"
                ),
            },
        }
    }

    fn table(&self) -> Option<&Table> {
        self.file.as_ref()?.get(&self.name)?.as_table()
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.as_deref().unwrap_or(Path::new("~/.modal.toml"));
        write!(f, "the profile `{}` in {}", self.name, path.display())
    }
}

/// `None` when there is no such file.
fn read(path: &Path) -> Result<Option<Table>> {
    let refuse = |reason: String| Err(Error::invalid(path.display().to_string(), reason));
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return refuse(format!("reading Modal's settings: {error}")),
        Ok(count) if count as u64 > FILE_BYTES_MAX => {
            return refuse(format!("settings of Modal have at most {FILE_BYTES_MAX} bytes"));
        }
        Ok(_) => {}
    }
    let Ok(text) = String::from_utf8(bytes) else {
        return refuse("settings of Modal are TOML, and this is not UTF-8".to_owned());
    };
    match text.parse::<Table>() {
        Ok(file) => Ok(Some(file)),
        // Its own display quotes the line, which may have the secret in it.
        Err(error) => {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            refuse(format!("line {line} is not TOML: {}", error.message()))
        }
    }
}

/// The profile that the file itself names, as Modal's own client for Python does it.
fn active(path: &Path, file: &Table, is_named: bool) -> Result<Option<String>> {
    let refuse = |reason: String| Err(Error::invalid(path.display().to_string(), reason));
    let mut active = Vec::new();
    for (name, profile) in file {
        let Some(profile) = profile.as_table() else {
            return refuse(format!(
                "`{name}` is in no profile; write it below a line such as [default]"
            ));
        };
        match profile.get("active") {
            Some(Value::Boolean(true)) => active.push(name),
            Some(Value::Boolean(false)) | None => {}
            Some(_) => {
                return refuse(format!("`active` of the profile `{name}` must be true or false"));
            }
        }
    }
    match active[..] {
        [] if file.len() > 1 && !is_named => refuse(format!(
            "no profile is active, of {}; choose one by `modal profile activate NAME` or in MODAL_PROFILE",
            names(file.keys())
        )),
        [] => Ok(None),
        [name] => Ok(Some(name.clone())),
        _ => refuse(format!(
            "more than one profile is active: {}; choose one by `modal profile activate NAME`",
            names(active.iter().copied())
        )),
    }
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
