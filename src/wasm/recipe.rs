//! What an image is made from: its name, its parent, imports, setup code and files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Component, Path, PathBuf};

use zip::ZipArchive;

use super::boot::BOOT_VERSION;
use super::pins::pins;
use crate::agent::agent_sources;
use crate::error::{Error, Result};
use crate::image::{FORMAT, ImageManifest, Store, check_image_name, key, write_private};

/// Bytes that the files of one image may have.
const SITE_BYTES_MAX: u64 = 512 << 20;
/// Files that one image may have.
const SITE_FILES_MAX: usize = 50_000;
/// Endings of files that only a machine of their own kind can load.
const NATIVE_ENDINGS: &[&str] = &["so", "pyd", "dylib", "dll", "a"];

/// What a custom image is made from; the counterpart of a custom container image.
///
/// ```
/// use kaa::ImageSpec;
///
/// let spec = ImageSpec { from: "sci".into(), imports: vec!["csv".into()], ..ImageSpec::new("mine") };
/// assert_eq!(spec.name, "mine");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSpec {
    /// The new image's name.
    pub name: String,
    /// The name of the image that it starts from. Default `base`.
    pub from: String,
    /// A file of Python that runs once; what it leaves in the namespace is there in every session.
    pub setup: Option<PathBuf>,
    /// Directories whose contents become importable.
    pub paths: Vec<PathBuf>,
    /// Wheels without native code, which become importable.
    pub pure_wheels: Vec<PathBuf>,
    /// Modules to import.
    pub imports: Vec<String>,
}

impl ImageSpec {
    /// An image like `base`, by another name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            from: "base".into(),
            setup: None,
            paths: Vec::new(),
            pure_wheels: Vec::new(),
            imports: Vec::new(),
        }
    }
}

/// A recipe with everything read that it names.
#[derive(Debug)]
pub(crate) struct Recipe {
    pub(crate) name: String,
    pub(crate) from: Option<String>,
    pub(crate) imports: Vec<String>,
    pub(crate) setup: Option<(String, String)>,
    /// Relative path to contents.
    site: BTreeMap<String, Vec<u8>>,
}

impl Recipe {
    /// The recipe of an image that comes with Kaa.
    pub(crate) fn built_in(name: &str) -> Option<Self> {
        let image = pins().images.get(name)?;
        Some(Self {
            name: name.to_owned(),
            from: image.from.clone(),
            imports: image.imports.clone(),
            setup: None,
            site: BTreeMap::new(),
        })
    }

    /// Reads everything that a custom image names.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming what can't be used and why.
    pub(crate) fn read(spec: &ImageSpec) -> Result<Self> {
        check_image_name(&spec.name)?;
        if pins().images.contains_key(&spec.name) {
            return Err(Error::invalid(
                format!("image name `{}`", spec.name),
                "this name belongs to an image that comes with Kaa; choose another",
            ));
        }
        for import in &spec.imports {
            let named = import.split('.').all(|part| crate::agent::check_name("", part).is_ok());
            if !named {
                return Err(Error::invalid(
                    format!("import `{import}`"),
                    "it is not a module's name",
                ));
            }
        }
        let setup = match &spec.setup {
            None => None,
            Some(path) => {
                let source = fs::read_to_string(path)
                    .map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Some((name, source))
            }
        };
        let mut site = Site::default();
        for path in &spec.paths {
            site.add_directory(path, path, 0)?;
        }
        for wheel in &spec.pure_wheels {
            site.add_wheel(wheel)?;
        }
        Ok(Self {
            name: spec.name.clone(),
            from: Some(spec.from.clone()),
            imports: spec.imports.clone(),
            setup,
            site: site.files,
        })
    }

    /// The key of the image that this makes from that parent.
    pub(crate) fn key(&self, module: &str, parent: Option<&ImageManifest>) -> String {
        let parent = parent.map_or("", |parent| parent.key.as_str());
        let imports = self.imports.join(",");
        let counts =
            format!("{FORMAT} {BOOT_VERSION} {} {}", self.setup.is_some(), self.site.len());
        let mut parts: Vec<&[u8]> =
            ["image", module, parent, &imports, &counts].map(str::as_bytes).to_vec();
        if let Some((path, source)) = &self.setup {
            parts.extend([path.as_bytes(), source.as_bytes()]);
        }
        for (path, bytes) in &self.site {
            parts.extend([path.as_bytes(), bytes]);
        }
        for (name, source) in agent_sources() {
            parts.extend([name.as_bytes(), source.as_bytes()]);
        }
        key(parts)
    }

    /// Writes the image's files, those of its parent first. Whether there are any.
    pub(crate) fn write_site(
        &self,
        store: &Store,
        parent: Option<&ImageManifest>,
        target: &Path,
    ) -> Result<bool> {
        let inherited = parent.filter(|parent| parent.site);
        if self.site.is_empty() && inherited.is_none() {
            return Ok(false);
        }
        let mut all = Site::default();
        if let Some(parent) = inherited {
            let place = store.image(&parent.key).join(super::boot::SITE);
            all.add_directory(&place, &place, 0)?;
        }
        all.files.extend(self.site.iter().map(|(path, bytes)| (path.clone(), bytes.clone())));
        for (path, bytes) in &all.files {
            let path = target.join(path);
            let context = || format!("writing {}", path.display());
            let parent = path.parent().expect("a file of the site lies below it");
            fs::create_dir_all(parent).map_err(|e| Error::io(context(), e))?;
            write_private(&path, bytes).map_err(|e| Error::io(context(), e))?;
        }
        Ok(true)
    }
}

/// Files on their way into an image.
#[derive(Default)]
struct Site {
    files: BTreeMap<String, Vec<u8>>,
    bytes: u64,
}

impl Site {
    fn add(&mut self, origin: &Path, name: String, bytes: Vec<u8>) -> Result<()> {
        let refuse = |reason: String| Err(Error::invalid(origin.display().to_string(), reason));
        let native = Path::new(&name).extension().and_then(|ending| ending.to_str());
        if native.is_some_and(|ending| NATIVE_ENDINGS.contains(&ending)) {
            return refuse(format!(
                "`{name}` is native code, which a Wasm guest can't load; only pure Python can be added"
            ));
        }
        self.bytes += bytes.len() as u64;
        if self.bytes > SITE_BYTES_MAX || self.files.len() >= SITE_FILES_MAX {
            return refuse(format!(
                "more than {SITE_FILES_MAX} files or {SITE_BYTES_MAX} bytes; leave out what isn't needed"
            ));
        }
        self.files.insert(name, bytes);
        Ok(())
    }

    fn add_directory(&mut self, root: &Path, directory: &Path, depth: usize) -> Result<()> {
        let context = || format!("reading {}", directory.display());
        if depth > 64 {
            return Err(Error::invalid(
                root.display().to_string(),
                "directories are nested too deeply",
            ));
        }
        for entry in fs::read_dir(directory).map_err(|e| Error::io(context(), e))? {
            let path = entry.map_err(|e| Error::io(context(), e))?.path();
            if path.file_name().is_some_and(|name| name == "__pycache__") {
                continue;
            }
            // Links are followed: what is copied is what an import on the host would find.
            let metadata = fs::metadata(&path)
                .map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
            if metadata.is_dir() {
                self.add_directory(root, &path, depth + 1)?;
            } else if metadata.is_file() {
                let mut bytes = Vec::new();
                File::open(&path)
                    .and_then(|file| file.take(SITE_BYTES_MAX).read_to_end(&mut bytes))
                    .map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
                let name = path.strip_prefix(root).expect("it was found below the root");
                let name = name.to_str().map(str::to_owned).ok_or_else(|| {
                    Error::invalid(path.display().to_string(), "its name is not UTF-8")
                })?;
                self.add(root, name, bytes)?;
            }
        }
        Ok(())
    }

    fn add_wheel(&mut self, wheel: &Path) -> Result<()> {
        let unreadable = |reason: String| Error::invalid(wheel.display().to_string(), reason);
        let name = wheel.file_name().unwrap_or_default().to_string_lossy();
        if !name.ends_with("-none-any.whl") {
            return Err(unreadable(
                "only wheels for any platform (`…-none-any.whl`) can be added".into(),
            ));
        }
        let bytes =
            fs::read(wheel).map_err(|e| Error::io(format!("reading {}", wheel.display()), e))?;
        let mut archive =
            ZipArchive::new(Cursor::new(bytes)).map_err(|e| unreadable(e.to_string()))?;
        for at in 0..archive.len() {
            let entry = archive.by_index(at).map_err(|e| unreadable(e.to_string()))?;
            if entry.is_dir() {
                continue;
            }
            let path = entry
                .enclosed_name()
                .filter(|path| path.components().all(|part| matches!(part, Component::Normal(_))));
            let path =
                path.as_deref().and_then(Path::to_str).map(str::to_owned).ok_or_else(|| {
                    unreadable(format!("`{}` is no path inside it", entry.name()))
                })?;
            let mut contents = Vec::new();
            entry
                .take(SITE_BYTES_MAX - self.bytes.min(SITE_BYTES_MAX) + 1)
                .read_to_end(&mut contents)
                .map_err(|e| unreadable(e.to_string()))?;
            self.add(wheel, path, contents)?;
        }
        Ok(())
    }
}
