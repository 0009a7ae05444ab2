//! What is in a sandbox: an image as Modal builds it, layer by layer.

use crate::error::{Error, Result};

/// Layers of one image, and characters of one command.
const LAYERS_MAX: usize = 100;
const COMMAND_CHARS_MAX: usize = 16 << 10;

/// An image of Modal's. Every step is a layer that Modal builds once and keeps.
///
/// ```
/// use kaa::modal::ModalImage;
///
/// let image = ModalImage::from_registry("python:3.11-slim")
///     .apt_install(["git"])
///     .pip_install(["dill", "numpy>=2"])
///     .env([("TZ", "UTC")]);
/// assert!(image.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModalImage {
    pub(super) base: Base,
    /// The commands of each layer after the base.
    pub(super) layers: Vec<Vec<String>>,
}

/// What an image begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    /// An image of a registry.
    Registry(String),
    /// One that Modal has: built before, or the snapshot of a file system.
    Id(String),
}

impl Default for ModalImage {
    fn default() -> Self {
        Self::from_registry("python:3.11-slim")
    }
}

impl ModalImage {
    /// An image of a public registry, by name and tag.
    #[must_use]
    pub fn from_registry(name: impl Into<String>) -> Self {
        Self { base: Base::Registry(name.into()), layers: Vec::new() }
    }

    /// An image that Modal has, by its id (`im-…`): what
    /// [`Sandbox::snapshot_filesystem`](super::Sandbox::snapshot_filesystem) gave, for one.
    #[must_use]
    pub fn from_id(id: impl Into<String>) -> Self {
        Self { base: Base::Id(id.into()), layers: Vec::new() }
    }

    /// Adds packages of Python, as pip names them. Nothing is done without any.
    #[must_use]
    pub fn pip_install<P: Into<String>>(self, packages: impl IntoIterator<Item = P>) -> Self {
        let packages = quoted(packages);
        if packages.is_empty() {
            return self;
        }
        self.dockerfile_commands([format!("RUN python -m pip install {packages}")])
    }

    /// Adds packages of the image's Debian. Nothing is done without any.
    #[must_use]
    pub fn apt_install<P: Into<String>>(self, packages: impl IntoIterator<Item = P>) -> Self {
        let packages = quoted(packages);
        if packages.is_empty() {
            return self;
        }
        self.dockerfile_commands([
            "RUN apt-get update".to_owned(),
            format!("RUN apt-get install -y {packages}"),
        ])
    }

    /// Adds environment variables.
    #[must_use]
    pub fn env<N: Into<String>, V: Into<String>>(
        self,
        variables: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        let commands = variables.into_iter().map(|(name, value)| {
            let (name, value) = (name.into(), value.into());
            format!("ENV {name}={}", shell_quoted(&value))
        });
        self.dockerfile_commands(commands)
    }

    /// Adds a layer of these commands of a Dockerfile, such as `RUN make`. Nothing is done without any.
    #[must_use]
    pub fn dockerfile_commands<C: Into<String>>(
        mut self,
        commands: impl IntoIterator<Item = C>,
    ) -> Self {
        let commands: Vec<String> = commands.into_iter().map(Into::into).collect();
        if !commands.is_empty() {
            self.layers.push(commands);
        }
        self
    }

    /// Checks what can be checked without Modal.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] says what would be right.
    pub fn validate(&self) -> Result<()> {
        let invalid = |reason: String| Err(Error::invalid("modal.image", reason));
        match &self.base {
            Base::Registry(name) if name.is_empty() || name.contains(char::is_whitespace) => {
                return invalid(format!("{name:?} is no name of an image"));
            }
            Base::Id(id) if !id.starts_with("im-") => {
                return invalid(format!("{id:?} is no id of an image; those begin with `im-`"));
            }
            Base::Registry(_) | Base::Id(_) => {}
        }
        if self.layers.len() > LAYERS_MAX {
            return invalid(format!("has more than {LAYERS_MAX} layers"));
        }
        for command in self.layers.iter().flatten() {
            if command.len() > COMMAND_CHARS_MAX || command.contains(['\n', '\r', '\0']) {
                let start: String = command.chars().take(60).collect();
                return invalid(format!(
                    "the command {start:?} has line breaks, or more than {COMMAND_CHARS_MAX} bytes; \
                     make it one line"
                ));
            }
        }
        Ok(())
    }
}

/// Packages as Modal's own clients send them: sorted, and quoted for a shell.
fn quoted<P: Into<String>>(packages: impl IntoIterator<Item = P>) -> String {
    let mut packages: Vec<String> = packages.into_iter().map(Into::into).collect();
    packages.sort();
    packages.iter().map(|package| shell_quoted(package)).collect::<Vec<_>>().join(" ")
}

/// As Python's `shlex.quote`.
fn shell_quoted(text: &str) -> String {
    let is_safe = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    if !text.is_empty() && text.chars().all(is_safe) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r#"'"'"'"#))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_those_of_the_official_clients() {
        let image = ModalImage::default()
            .pip_install(["numpy>=2", "dill"])
            .apt_install(["git"])
            .env([("A", "1"), ("B", "it's")])
            .pip_install(Vec::<String>::new());
        let expected: [&[&str]; 3] = [
            &["RUN python -m pip install dill 'numpy>=2'"],
            &["RUN apt-get update", "RUN apt-get install -y git"],
            &["ENV A=1", r#"ENV B='it'"'"'s'"#],
        ];
        assert_eq!(image.layers, expected);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        for image in [
            ModalImage::from_registry(""),
            ModalImage::from_registry("a b"),
            ModalImage::from_id("python:3.11"),
            ModalImage::default().dockerfile_commands(["RUN a\nRUN b"]),
        ] {
            let error = image.validate().unwrap_err();
            assert!(error.to_string().starts_with("modal.image"), "{error}");
        }
    }
}
