//! The pinned guest and the built-in images, from `wasm/image.toml`.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

/// A file with the bytes that it must have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PinnedFile {
    /// Its name, or its path in the wheel.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// The guest: a wheel, and the two files in it that are used.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PinnedGuest {
    pub(crate) package: String,
    pub(crate) version: String,
    pub(crate) python: String,
    pub(crate) wheel: PinnedFile,
    pub(crate) module: PinnedFile,
    pub(crate) stdlib: PinnedFile,
}

/// An image that comes with Kaa.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BuiltIn {
    #[serde(default)]
    pub(crate) from: Option<String>,
    pub(crate) imports: Vec<String>,
}

/// All pins.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pins {
    pub(crate) guest: PinnedGuest,
    pub(crate) images: BTreeMap<String, BuiltIn>,
}

/// The pins of this build of Kaa.
pub(crate) fn pins() -> &'static Pins {
    static PINS: OnceLock<Pins> = OnceLock::new();
    PINS.get_or_init(|| {
        toml::from_str(include_str!("../../wasm/image.toml")).expect("a test reads the pins")
    })
}

#[cfg(test)]
mod tests {
    use super::pins;

    #[test]
    fn the_pins_are_readable_and_every_parent_exists() {
        for (name, image) in &pins().images {
            assert!(image.from.iter().all(|from| pins().images.contains_key(from)), "{name}");
        }
        assert!(pins().images.contains_key("base"));
    }
}
